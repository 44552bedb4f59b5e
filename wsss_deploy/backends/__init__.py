"""One small file per runtime behind one protocol."""
