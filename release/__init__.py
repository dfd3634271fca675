"""What makes and proves a release: wheels, the matrix of versions. Run by the Makefile, and no part of the package."""
