"""Matrix instructions of Hopper's warp groups, as functions of CUDA C++."""

from collections.abc import Collection


def _instruction(
    name: str, width: int, room: str, *, of_registers: bool, columns: bool, fresh: bool, half: bool,
) -> str:  # fmt: skip
    """A function of one instruction: 64 rows times 16 deep times `width` columns, added to `d`.

    The left side comes from registers or shared memory; the right side has its `columns` side by
    side there or its rows; `fresh` overwrites `d`.
    """
    results = width // 2
    d = ", ".join(f"%{i}" for i in range(results))
    if of_registers:
        left, right = ", ".join(f"%{results + i}" for i in range(4)), f"%{results + 4}"
        left, taken = f"{{{left}}}", "const unsigned (&a)[4]"
        given = ", ".join(f'"r"(a[{i}])' for i in range(4))
    else:
        left, right = f"%{results}", f"%{results + 1}"
        taken, given = "unsigned long long a", '"l"(a)'
    kind = "f16" if half else "bf16"
    # Scaled by 1 and 1; then whether the left side, where in memory, and the right one lie across.
    flags = f"1, 1, {int(columns)}" if of_registers else f"1, 1, 0, {int(columns)}"
    written = ", ".join(f'"{"=" if fresh else "+"}f"(d[{i}])' for i in range(results))
    return (
        f"__device__ __forceinline__ void {name}"
        f"(float (&d)[{room}], {taken}, unsigned long long b) {{\n"
        f'  asm volatile("{{\\n.reg .pred more;\\nsetp.ne.b32 more, {int(not fresh)}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} '
        f'{{{d}}}, {left}, {right}, more, {flags};\\n}}"\n'
        f'      : {written} : {given}, "l"(b));\n}}\n'
    )


def products(widths: Collection[int], half: bool) -> str:
    """Scores<W>::first and ::more, for each W: 64 rows with W rows, 16 columns of them, into an
    array for SPAN. The 64 rows are in shared memory or in registers."""
    text = "template <int W> struct Scores;\n"
    for width in sorted(widths):
        each = (
            "static "
            + _instruction(
                name,
                width,
                "SPAN / 2",
                of_registers=of_registers,
                columns=False,
                fresh=name == "first",
                half=half,
            )
            for name in ("first", "more")
            for of_registers in (False, True)
        )
        text += f"template <> struct Scores<{width}> {{\n{''.join(each)}}};\n"
    return text


def weighted(D: int, half: bool) -> str:
    """`weighted`: 64 rows of weights, in registers, with 16 rows of D columns."""
    return _instruction(
        "weighted", D, "D / 2", of_registers=True, columns=True, fresh=False, half=half
    )
