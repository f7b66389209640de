// Loads and stores with a cache hint: plain accesses here.
#pragma once

#define CUDA_ON_CPU_LOAD(name) \
  template <class T>           \
  inline T name(const T* p) {  \
    return *p;                 \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldcv)
CUDA_ON_CPU_LOAD(__ldlu)
#undef CUDA_ON_CPU_LOAD

#define CUDA_ON_CPU_STORE(name)     \
  template <class T>                \
  inline void name(T* p, T value) { \
    *p = value;                     \
  }
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stwt)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
#undef CUDA_ON_CPU_STORE
