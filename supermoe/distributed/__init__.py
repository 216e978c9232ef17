"""Many ranks, one model: the mesh, experts and tables whose rows lie on several ranks, strategies for the rest."""
