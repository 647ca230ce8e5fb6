// Stands in for NVTX: ranges are counted, so that one that is never closed is found (dev/emu/nvtx.cc).
#pragma once

int nvtxRangePushA(const char* message); // its depth, from 0
int nvtxRangePop(void);
void nvtxMarkA(const char* message);
