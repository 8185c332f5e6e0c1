"""Video and sound files ↔ frames and samples: the door to PyAV (FFmpeg), extra `video`"""
