"""How files of videos are named."""

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".vob", ".3gp", ".3g2", ".ogv", ".asf", ".f4v", ".divx", ".gif"),
)
