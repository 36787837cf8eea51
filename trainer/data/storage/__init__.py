"""From a sample's number to its bytes: objects in a folder or a bucket, read in ranges, checked and cached."""
