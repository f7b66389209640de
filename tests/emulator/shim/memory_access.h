// Loads and stores with a cache hint: plain accesses here.
#pragma once

#define EMULATOR_LOAD(name)   \
  template <class T>          \
  inline T name(const T* p) { \
    return *p;                \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldcv)
EMULATOR_LOAD(__ldlu)
#undef EMULATOR_LOAD

#define EMULATOR_STORE(name)        \
  template <class T>                \
  inline void name(T* p, T value) { \
    *p = value;                     \
  }
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stwt)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
#undef EMULATOR_STORE
