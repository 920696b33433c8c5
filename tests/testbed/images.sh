# Images of programs that tests/tests/l3_*.rs run, made once each. Sourced by the scripts that make them, after lib.sh.
. "$testbed/stack.sh"

# make_once NAME PROGRAM TITLE MAKER: makes the image /images/NAME of the nodes, a sandbox, by calling MAKER with its folder on this host.
# PROGRAM is a file of the image that the last step of MAKER brings: whoever finds it finds all of the image. Two at once wait for each other.
make_once() {
    local name=$1 program=$2 title=$3 maker=$4 image=$HPC_PREFIX/shared/images/$1
    [ "$STACK" = full ] || die "STACK=$STACK ($why): $title is for the full stack"
    exec 9>"$run/$name.lock"
    flock 9
    [ ! -x "$image/$program" ] || return 0
    say "making the image of $title"
    "$maker" "$image" 9>&-
}
