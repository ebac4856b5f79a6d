"""The loaders behind Accelerate's names: slicing, dispatching, joining, and the samplers that they cut.

Way in: `loaders.DataLoaderShard` and `loaders.DataLoaderDispatcher`, between which `data_loader.py` above chooses;
`joining.joining` for ranks with uneven inputs. Must not know what is sharded, or the optimizer.
"""
