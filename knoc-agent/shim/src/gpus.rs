//! PURE: which GPUs a container sees, from what it asks for and from the job's environment as Slurm sets it.
//!
//! As with a device plugin, only containers that ask for GPUs get them. The runtime binds the driver's files (`--nv`,
//! `--rocm`) and sets the library search path for its own child. The program gets its environment by the launch protocol,
//! so the search path and Slurm's choice of devices are added here. Variables that the pod sets take precedence.

use knoc_proto::{expand::Variable, pb, pod};

use crate::runtime::Gpus;

/// The variables by which Slurm says which devices it chose, by vendor.
const NVIDIA: &[&str] = &["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"];
const AMD: &[&str] = &["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"];

/// Where the runtimes bind the driver's libraries.
const LIBRARIES: &[u8] = b"/.singularity.d/libs";
const SEARCH_PATH: &[u8] = b"LD_LIBRARY_PATH";

/// The variables of the job's environment that name devices.
pub(crate) fn devices(var: impl Fn(&str) -> Option<String>) -> Vec<(String, String)> {
    let names = NVIDIA.iter().chain(AMD);
    names
        .filter_map(|name| Some(((*name).to_owned(), var(name)?)))
        .collect()
}

/// The GPUs that the container asks for.
pub(crate) fn asked(container: &pb::Container) -> Gpus {
    Gpus {
        nvidia: pod::requests(container, pod::NVIDIA),
        amd: pod::requests(container, pod::AMD),
    }
}

/// The variables of `devices` that a container with these GPUs gets, in the form `NAME=value`.
pub(crate) fn variables(gpus: Gpus, devices: &[(String, String)]) -> impl Iterator<Item = String> {
    let wanted = move |name: &str| {
        (gpus.nvidia && NVIDIA.contains(&name)) || (gpus.amd && AMD.contains(&name))
    };
    let given = devices.iter().filter(move |(name, _)| wanted(name));
    given.map(|(name, value)| format!("{name}={value}"))
}

/// Appends the driver's libraries to the loader's search path, after the folders that the image or the pod names.
pub(crate) fn search_libraries(env: &mut Vec<Variable>) {
    match env.iter_mut().find(|(name, _)| name == SEARCH_PATH) {
        Some((_, value)) if !value.is_empty() => {
            value.push(b':');
            value.extend_from_slice(LIBRARIES);
        }
        Some((_, value)) => *value = LIBRARIES.to_vec(),
        None => env.push((SEARCH_PATH.to_vec(), LIBRARIES.to_vec())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(resource: &str, amount: i64) -> pb::Container {
        let limits = pb::Resources {
            extended: [(resource.to_owned(), amount)].into(),
            ..Default::default()
        };
        pb::Container {
            limits: Some(limits),
            ..Default::default()
        }
    }

    #[test]
    fn only_a_container_that_asks_for_gpus_gets_those_of_its_vendor() {
        let job = |name: &str| Some(format!("of {name}")).filter(|_| !name.starts_with("HIP"));
        let devices = devices(job);
        let given = |resource, amount| {
            let gpus = asked(&container(resource, amount));
            variables(gpus, &devices).collect::<Vec<_>>().join("|")
        };
        assert_eq!(
            given("nvidia.com/gpu", 1),
            "CUDA_VISIBLE_DEVICES=of CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES=of NVIDIA_VISIBLE_DEVICES"
        );
        assert_eq!(
            given("amd.com/gpu", 2),
            "ROCR_VISIBLE_DEVICES=of ROCR_VISIBLE_DEVICES"
        );
        assert_eq!(given("nvidia.com/gpu", 0), "");
        assert_eq!(given("example.com/fpga", 1), "");
    }

    #[test]
    fn the_drivers_libraries_come_last() {
        for (before, after) in [
            (None, "/.singularity.d/libs"),
            (Some(""), "/.singularity.d/libs"),
            (Some("/own"), "/own:/.singularity.d/libs"),
        ] {
            let given = before.map(|value: &str| (SEARCH_PATH.to_vec(), value.as_bytes().to_vec()));
            let mut env: Vec<Variable> = given.into_iter().collect();
            search_libraries(&mut env);
            assert_eq!(env, [(SEARCH_PATH.to_vec(), after.as_bytes().to_vec())]);
        }
    }
}
