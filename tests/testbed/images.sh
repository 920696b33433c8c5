# Images of programs that tests/tests/l3_*.rs run, made once each. Sourced by the scripts that make them, after lib.sh.
. "$testbed/stack.sh"

modules=/usr/local/lib/python3.13/dist-packages # of an image with Debian's Python

# unpack_wheels IMAGE ARGUMENT…: unpacks what pip installs with these arguments for the Python of the image, whichever this host has. $work is a
# folder for the time being.
unpack_wheels() {
    local image=$1
    shift
    python_env "$work/python"
    "$work/python/bin/pip" install -q --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --implementation cp --python-version 3.13 --target "$image$modules" "$@"
    # The programs of the wheels name the Python of this host.
    rm -rf "$image$modules/bin"
    chmod -R a+rX "$image$modules"
}

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
