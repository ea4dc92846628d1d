// The Python module whose import registers the CPU kernels, and the choice of their instruction set.
#include <Python.h>

#include <cstring>

#include "isa.h"

namespace {

constexpr const char* ISA_NAMES[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

PyObject* isa_name(cnm::Isa isa) { return PyUnicode_FromString(ISA_NAMES[static_cast<int>(isa)]); }

PyObject* isa(PyObject*, PyObject*) { return isa_name(cnm::isa()); }

PyObject* best_isa(PyObject*, PyObject*) { return isa_name(cnm::best_isa()); }

PyObject* vendor(PyObject*, PyObject*) { return PyUnicode_FromString(cnm::vendor()); }

PyObject* set_isa(PyObject*, PyObject* argument) {
    PyObject* bytes = PyUnicode_AsUTF8String(argument);
    if (bytes == nullptr) return nullptr;
    int found = -1;
    for (int i = 0; i < 5; ++i) {
        if (std::strcmp(PyBytes_AsString(bytes), ISA_NAMES[i]) == 0) found = i;
    }
    Py_DECREF(bytes);
    if (found < 0) {
        return PyErr_Format(PyExc_ValueError,
                            "unknown instruction set %R; choose one of portable, avx2, avx512, avx512bf16, amx",
                            argument);
    }
    if (static_cast<cnm::Isa>(found) > cnm::best_isa()) {
        return PyErr_Format(PyExc_ValueError, "this machine cannot run %R; the best it can is %s", argument,
                            ISA_NAMES[static_cast<int>(cnm::best_isa())]);
    }
    cnm::set_isa(static_cast<cnm::Isa>(found));
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set the kernels run on."},
    {"best_isa", best_isa, METH_NOARGS, "The best instruction set this machine can run."},
    {"vendor", vendor, METH_NOARGS, "The processor's, as it names itself: GenuineIntel, AuthenticAMD."},
    {"set_isa", set_isa, METH_O, "Makes the kernels run on a lower instruction set."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C_cpu",
    "C++ CPU kernels; importing registers them with torch.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

// Python looks for this name.  NOLINTNEXTLINE(bugprone-reserved-identifier)
PyMODINIT_FUNC PyInit__C_cpu() { return PyModule_Create(&module); }
