"""What samples: requests in, completions out."""
