"""One model that serves several numbers of experts per token: `partition.elastic`."""
