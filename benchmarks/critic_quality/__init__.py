"""A critic's figures beside what rules without a model reach, given the known answer."""
