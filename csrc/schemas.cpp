// The library's operators: their schemas.
//
// Each op has a forward under its public name, which also returns what its backward reads, and a backward. Shapes are
// stated in cnm_kernels/ops/<op>.py; implementations register themselves in *_op.cpp.
#include <torch/csrc/stable/library.h>

#include "library.h"

STABLE_TORCH_LIBRARY(CNM_LIBRARY, m) {
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
        "branched_attention(Tensor query, Tensor? key, Tensor? value, Tensor key_weights, bool causal, "
        "Tensor? key_lengths, float scale) -> (Tensor, Tensor)");
    m.def(
        "branched_attention_backward(Tensor d_out, Tensor query, Tensor? key, Tensor? value, Tensor key_weights, "
        "bool causal, Tensor? key_lengths, float scale, Tensor stats, bool need_query, bool need_key, "
        "bool need_value, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "linear_nll(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor valid_lengths, "
        "float label_smoothing, bool return_accuracy, bool keep_expected) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "linear_nll_backward(Tensor d_nll, Tensor hidden, Tensor weight, Tensor bias, Tensor target, "
        "Tensor valid_lengths, float label_smoothing, Tensor stats, Tensor expected, bool need_hidden, "
        "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
    m.def(
        "absorbed_attention(Tensor query, Tensor key, Tensor? value, Tensor? key_bias, Tensor? key_weight, "
        "Tensor? query_lengths, Tensor? key_lengths, float scale) -> Tensor");
    m.def(
        "absorbed_attention_backward(Tensor d_out, Tensor query, Tensor key, Tensor? value, Tensor? key_bias, "
        "Tensor? key_weight, Tensor? query_lengths, Tensor? key_lengths, float scale, bool need_query, bool need_key, "
        "bool need_value, bool need_bias, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, bool relu, Tensor? lengths, bool split) -> Tensor");
    m.def(
        "linear_backward(Tensor d_out, Tensor x, Tensor weight, Tensor? out, Tensor? lengths, bool split, "
        "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
    m.def("dropout(Tensor x, float p, Tensor seed, int offset) -> Tensor");
    m.def(
        "dropout_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float p, Tensor seed, "
        "int offset, float eps, Tensor? sample_indices) -> (Tensor, Tensor)");
    m.def(
        "dropout_add_layer_norm_backward(Tensor d_out, Tensor x, Tensor residual, Tensor weight, Tensor stats, "
        "float p, Tensor seed, int offset, Tensor? sample_indices, bool need_x, bool need_residual, "
        "bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)");
}
