"""Audit: events, their renderings, the chain of the log, detections, timelines. It opens no file and no socket."""
