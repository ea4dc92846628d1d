// The Python module whose import registers the GPU kernels, for the operators that _C_cpu declares.
#include <Python.h>

namespace {

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C_cuda",
    "CUDA kernels; importing registers them with torch.",
    -1,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
