// Matrix products that do nothing, and are counted.
#include "log.h"

extern "C" {
CREATES(cublasCreate_v2)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetMathMode)

int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}

const char* cublasGetStatusName(int) { return "a status of cublas"; }
const char* cublasGetStatusString(int) { return "a status of cublas"; }

COUNTED(cublasDcopy_v2)
COUNTED(cublasDgeam)
COUNTED(cublasDgemmBatched)
COUNTED(cublasDgemmStridedBatched)
COUNTED(cublasDgemm_v2)
COUNTED(cublasDgetrfBatched)
COUNTED(cublasDgetriBatched)
COUNTED(cublasGemmBatchedEx)
COUNTED(cublasGemmEx)
COUNTED(cublasGemmStridedBatchedEx)
COUNTED(cublasScopy_v2)
COUNTED(cublasSgeam)
COUNTED(cublasSgemmBatched)
COUNTED(cublasSgemmStridedBatched)
COUNTED(cublasSgemm_v2)
COUNTED(cublasSgetrfBatched)
COUNTED(cublasSgetriBatched)
COUNTED(cublasSscal_v2)
}
