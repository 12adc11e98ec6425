"""Images and labels from any source, verified and split into folds.

Every source (folder, archive, CSV, parquet, hub, published data set) becomes an `ImageDataset`.
Nothing here imports torch or knows of predictions.
"""
