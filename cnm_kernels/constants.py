"""Numbers of the published model that more than one backend needs."""

MIN_WIDTH = 0.1  # widths below this are clamped before the Gaussian (published `clamp(0.1)`)
MIN_PROPOSAL_WIDTH = 0.01  # the same for CPL's proposals (published `clamp(1e-2)`)
KEY_WEIGHT_EPS = 1e-10  # added to every key weight, so that a row of zeros is plain softmax
LABEL_SMOOTHING = 0.1
BETA_1 = 0.1  # margin to the hard negative
BETA_2 = 0.15  # margin to the easy negative
LAYER_NORM_EPS = 1e-5
DROPOUT_LEVELS = 1 << 16  # dropout decides on 16 random bits per element
