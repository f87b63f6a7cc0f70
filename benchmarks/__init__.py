"""Speed of the kernels and traces beside other packages, as ratios measured in one run; never asserted by a test."""
