// ONNX Runtime loads cuDNN by name and looks its functions up one by one. Of those that it calls for our graphs, none
// computes; a graph that calls another one fails with that one's name.
#include "log.h"

extern "C" {
CREATES(cudnnCreate)
SUCCEEDS(cudnnDestroy)
SUCCEEDS(cudnnSetStream)

size_t cudnnGetVersion() { return 91300; }
const char* cudnnGetErrorString(int) { return "an error of cuDNN"; }
void cudnnGetLastErrorString(char* text, size_t) { *text = '\0'; }
}
