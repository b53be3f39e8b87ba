"""Images on disk: webdataset shards, one class a shard, with a manifest and an index for random access."""
