"""What a sample is: schemas, batches and datasets."""
