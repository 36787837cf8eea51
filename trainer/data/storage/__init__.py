"""From the number of a sample to its bytes: objects in a folder or a bucket, read in ranges, checked and cached."""
