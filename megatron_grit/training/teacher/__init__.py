"""What a frozen model says of rows: from a model beside the trained one, or from a cache."""
