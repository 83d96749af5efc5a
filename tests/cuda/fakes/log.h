// What the stand-ins share: one line per call that a test counts, appended to the file named by FAKE_CUDA_LOG.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace fake {

inline void note(const char* format, ...) {
  static const char* path = std::getenv("FAKE_CUDA_LOG");
  static const int file = path == nullptr ? -1 : open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (file < 0) return;
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  int length = std::vsnprintf(line, sizeof line - 1, format, arguments);
  va_end(arguments);
  if (length > static_cast<int>(sizeof line) - 2) length = sizeof line - 2;
  line[length++] = '\n';
  if (write(file, line, length) != length) std::abort();
}

inline void* handle() {  // of an object that nobody looks into
  static char object;
  return &object;
}

}  // namespace fake

// Functions of libraries whose headers we do without. Their arguments are not looked at, so they need no types.
#define SUCCEEDS(name) \
  int name() { return 0; }
#define COUNTED(name)      \
  int name() {             \
    fake::note(#name);     \
    return 0;              \
  }
#define CREATES(name)         \
  int name(void** object) {   \
    *object = fake::handle(); \
    return 0;                 \
  }
