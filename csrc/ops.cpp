// The library's operators: their schemas, and the Python module whose import registers them.
//
// Each op has a forward under its public name, which also returns what its backward reads, and a backward. Shapes are
// stated in cnm_kernels/ops.py; implementations register themselves in cpu/*_op.cpp.
#include <Python.h>

#include <cstring>

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

STABLE_TORCH_LIBRARY(cnm_kernels, m) {
    m.def(
        "gaussian_mask(Tensor center, Tensor width, int length, float alpha, float min_width, bool complement) "
        "-> Tensor");
    m.def(
        "gaussian_mask_backward(Tensor d_out, Tensor center, Tensor width, float alpha, float min_width, "
        "bool complement) -> (Tensor, Tensor)");
    m.def(
        "intra_video_contrastive_loss(Tensor positive, Tensor hard, Tensor easy, float beta_1, float beta_2) "
        "-> Tensor");
    m.def(
        "intra_video_contrastive_loss_backward(Tensor d_loss, Tensor positive, Tensor hard, Tensor easy, "
        "float beta_1, float beta_2) -> (Tensor, Tensor, Tensor)");
    m.def(
        "attention(Tensor query, Tensor? key, Tensor? value, Tensor? key_weight, Tensor? center, Tensor? width, "
        "float alpha, float min_width, bool complement, bool causal, Tensor? key_lengths, float scale, "
        "bool return_weights) -> (Tensor, Tensor, Tensor)");
    m.def(
        "attention_backward(Tensor d_out, Tensor? d_weights, Tensor query, Tensor? key, Tensor? value, "
        "Tensor? key_weight, Tensor? center, Tensor? width, float alpha, float min_width, bool complement, "
        "bool causal, Tensor? key_lengths, float scale, Tensor stats, bool need_query, bool need_key, "
        "bool need_value, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "linear_nll(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor valid_lengths, "
        "float label_smoothing, bool return_accuracy, bool keep_expected) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "linear_nll_backward(Tensor d_nll, Tensor hidden, Tensor weight, Tensor bias, Tensor target, "
        "Tensor valid_lengths, float label_smoothing, Tensor lse, Tensor expected, bool need_hidden, "
        "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor");
    m.def(
        "linear_backward(Tensor d_out, Tensor x, Tensor weight, Tensor? out, bool need_x, bool need_weight, "
        "bool need_bias) -> (Tensor, Tensor, Tensor)");
    m.def("dropout(Tensor x, float p, Tensor seed, int offset) -> Tensor");
    m.def(
        "dropout_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float p, Tensor seed, "
        "int offset, float eps) -> (Tensor, Tensor)");
    m.def(
        "dropout_add_layer_norm_backward(Tensor d_out, Tensor x, Tensor residual, Tensor weight, Tensor stats, "
        "float p, Tensor seed, int offset, bool need_x, bool need_residual, bool need_weights) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
}

namespace {

constexpr const char* ISA_NAMES[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

PyObject* isa_name(cnm::Isa isa) { return PyUnicode_FromString(ISA_NAMES[static_cast<int>(isa)]); }

PyObject* isa(PyObject*, PyObject*) { return isa_name(cnm::isa()); }

PyObject* best_isa(PyObject*, PyObject*) { return isa_name(cnm::best_isa()); }

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
    {"set_isa", set_isa, METH_O, "Makes the kernels run on a lower instruction set."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_cpu", "C++ CPU kernels; importing registers them with torch.", -1, methods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C_cpu() { return PyModule_Create(&module); }
