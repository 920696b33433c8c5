// Only marks the folder: built with -modfile of the test bed's control plane, so that versions, downloads and the
// compiler's cache are the same.
module interop

go 1.26.0
