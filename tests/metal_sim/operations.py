"""Kinds of operations that mode arithmetic counts, and which names in compiled code are of which."""

from __future__ import annotations

# Kind -> what counts as one of it, in one lane.
KINDS = {
    "fma": "a fused multiply-add, where the source has both in one expression or says fma",
    "float": "a sum, difference or product of floats or halves",
    "divide": "a floating-point division or inverse",
    "sqrt": "a square root",
    "rsqrt": "1 / sqrt(x)",
    "exp2": "an exponential; with a float operation more for base e or 10",
    "log2": "a logarithm, likewise",
    "sine": "a sine or cosine",
    "round": "rounding to an integral float",
    "library": "a function of many operations: tan, tanh, fmod, ...",
    "bitwise": "and, or, exclusive or, not; so do predicates",
    "integer": "a sum or difference",
    "integer64": "of 64-bit integers",
    "multiply": "a product of integers",
    "multiply64": "of 64-bit integers",
    "integer_divide": "a quotient or remainder of integers",
    "integer64_divide": "of 64-bit integers",
    "shift": "a shift or rotation by a constant",
    "shift_left_dynamic": "a shift by a value",
    "shift_right_dynamic": "a shift or rotation by a value",
    "extract": "a shift right by a constant, then a mask of the lowest bits",
    "bit_count": "population count, leading or trailing zeros, reversal",
    "compare": "a comparison whose result is not just selected by",
    "select": "a comparison and a selection by it, a minimum, a maximum",
    "convert": "between integer and float",
    "half": "between half and float",
    "bfloat": "between bfloat and float",
    "branch": "a conditional branch",
    "shuffle": "a value from a lane at a fixed distance, or from one lane for all",
    "shuffle_any": "a value from whichever lane each lane says",
    "reduction": "simd_sum, simd_max and their like",
    "quad_reduction": "the same over four lanes",
    "scan": "a prefix sum or product",
    "vote": "a ballot, any, all",
    "matrix": "a lane's part in a product of two 8 x 8 matrices",
    "atomic": "an atomic access; a read-modify-write is one",
    "barrier": "threadgroup_barrier",
    "simdgroup_barrier": "simdgroup_barrier",
    "load_device": "a load of up to 16 bytes from a buffer in device memory",
    "store_device": "a store to one",
    "load_constant": "a load from a buffer in constant memory, or of a shape or stride",
    "load_table": "a load from an array of constants in the program",
    "load_threadgroup": "a load from threadgroup memory",
    "store_threadgroup": "a store to it",
    "load_thread": "a load from an array of the thread's own that is not in registers",
    "store_thread": "a store to one",
    "load_generic": "a load that could be from several of these",
    "store_generic": "a store likewise",
}

FREE = {
    *("phi", "getelementptr", "bitcast", "addrspacecast", "ptrtoint", "inttoptr", "trunc", "alloca", "freeze", "fneg"),
    *("extractelement", "insertelement", "shufflevector", "extractvalue", "insertvalue", "ret", "unreachable", "fence"),
}
BINARY = {
    **dict.fromkeys(("fadd", "fsub", "fmul"), "float"),
    **dict.fromkeys(("and", "or", "xor"), "bitwise"),
    **dict.fromkeys(("add", "sub"), "integer"),
    **dict.fromkeys(("udiv", "sdiv", "urem", "srem"), "integer_divide"),
    "mul": "multiply",
}
WIDE = {"integer": "integer64", "multiply": "multiply64", "integer_divide": "integer64_divide"}
SHIFTS = ("shl", "lshr", "ashr")
CONVERT = ("sitofp", "uitofp", "fptosi", "fptoui")

# Functions of the C library, and LLVM's intrinsics without `llvm.` and their types.
_ONE = {
    "fma": "fma fmuladd",
    "exp2": "exp2",
    "log2": "log2",
    "sine": "sin cos",
    "sqrt": "sqrt",
    "round": "floor ceil trunc round rint nearbyint roundeven",
    "select": "minnum maxnum minimum maximum minimumnum maximumnum fmin fmax umin umax smin smax abs ucmp scmp",
    "integer": "uadd.sat usub.sat sadd.sat ssub.sat",
    "bit_count": "ctpop ctlz cttz bitreverse bswap",
    "convert": "fptosi.sat fptoui.sat",
    "compare": "is.fpclass",
    "library": "tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh fmod nextafter",
}
FUNCTIONS: dict[str, dict[str, int]] = {
    **{name: {kind: 1} for kind, names in _ONE.items() for name in names.split()},
    **{name: {} for name in ("fabs", "copysign")},  # a modifier of the operation that takes the value
    **{name: {"exp2": 1, "float": 1} for name in ("exp", "exp10")},
    **{name: {"log2": 1, "float": 1} for name in ("log", "log10")},
    "pow": {"exp2": 1, "log2": 1, "float": 1},
    "ldexp": {"exp2": 1, "convert": 1, "float": 1},
}
IGNORED = ("lifetime.", "assume", "experimental.noalias", "dbg.", "invariant.", "donothing")
# `llvm.vector.reduce.` of a vector's components; those not named are a minimum or maximum.
REDUCED = {"add": "integer", "mul": "multiply", "fadd": "float", "fmul": "float"}
REDUCED |= dict.fromkeys(("and", "or", "xor"), "bitwise")

# Of include/msl_simd.h.
RUNTIME = {"__msl_tgbar": "barrier", "__msl_sgbar": "simdgroup_barrier"}
RUNTIME_FREE = {"__msl_tg", "__msl_lane", "__msl_sgsize"}
REDUCTIONS = ("sum", "product", "min", "max", "and", "or", "xor")
VOTES = ("ballot", "any", "all", "is_first", "active_threads_mask")
