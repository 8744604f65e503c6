"""Text in, packed batches out; models by recipe; the training loop: an application built on `subspan.optim`."""
