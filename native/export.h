// How a function of the C interface is declared: visible, and called by its plain name.
#pragma once
#if defined(_WIN32)
#define FLEDGE_API extern "C" __declspec(dllexport)
#else
#define FLEDGE_API extern "C" __attribute__((visibility("default")))
#endif
