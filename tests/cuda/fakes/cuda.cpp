// The driver, of which ONNX Runtime links one function.
#include "log.h"

extern "C" {
SUCCEEDS(cuTensorMapEncodeTiled)
}
