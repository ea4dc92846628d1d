"""Drop-in acceleration of research code that was built on the published CNM or CPL: see ``accelerate``."""
