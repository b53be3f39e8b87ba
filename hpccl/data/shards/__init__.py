"""Images on disk: webdataset shards of one class each, with a manifest and an index for random access."""
