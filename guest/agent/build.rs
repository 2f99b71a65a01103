//! Links the program without libc, so that process 1 is small and touches few pages.

fn main() {
    for argument in
        ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noseparate-code"]
    {
        println!("cargo::rustc-link-arg-bin=kiln-agent={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
