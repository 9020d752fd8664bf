// Declares a function of the C interface: exported, with C linkage.
#pragma once
#if defined(_WIN32)
#define FLEDGE_API extern "C" __declspec(dllexport)
#else
#define FLEDGE_API extern "C" __attribute__((visibility("default")))
#endif
