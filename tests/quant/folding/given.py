"""A guide that hands out statistics it was given."""

from mlx_rotor.quant.guide import Unguided


class Given(Unguided):
    digest = "given"

    def __init__(self, weights, statistics):
        super().__init__(weights)
        self.statistics = statistics

    def layer(self, number, entries):
        return self.weights, self.statistics
