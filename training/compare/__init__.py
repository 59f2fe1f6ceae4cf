"""A converted model beside its original: every measurement there is, on one page."""
