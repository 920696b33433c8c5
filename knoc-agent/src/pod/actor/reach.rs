//! What the tasks that bring something to a running shim have in common.

use std::time::Duration;

use knoc_proto::{error::chain, ids::PodUid, pb};

use super::Actor;
use crate::{pod::stage, shim_links::Client, shim_steps::Use, site::Site};

/// The first and the longest pause after an image could not be found, as in Kubernetes.
pub(super) const IMAGE_AGAIN: [Duration; 2] = [Duration::from_secs(10), Duration::from_mins(5)];
/// The first and the longest pause after the shim did not take something.
pub(super) const GIVE_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_mins(1)];
/// How many images of one container the job file names.
const KEPT_IMAGES: usize = 8;

/// The pause before the next try; none before the first one.
pub(super) fn pause(tries: u32, [first, longest]: [Duration; 2]) -> Duration {
    let Some(earlier) = tries.checked_sub(1) else {
        return Duration::ZERO;
    };
    let pause = first.saturating_mul(1 << earlier.min(10)).min(longest);
    pause.mul_f64(rand::random_range(0.75..1.25))
}

/// The shim of a pod, if it can do that. If compute nodes cannot reach the agent, a job step carries the link while the
/// second value, if there is one, is held.
pub(super) async fn client(
    site: &Site,
    uid: &PodUid,
    capability: &'static str,
) -> Result<(Client, Option<Use>), String> {
    let text = |status: tonic::Status| status.message().to_owned();
    let used = match site.shim_links.client(uid) {
        Some(_) => site.shim_steps.held(uid),
        None => site.shim_steps.reach(uid).await.map_err(text)?,
    };
    let able = site.shim_links.able(uid, capability);
    let no_link = || {
        Err(tonic::Status::unavailable(
            "the shim has no link to the agent now",
        ))
    };
    Ok((able.unwrap_or_else(no_link).map_err(text)?, used))
}

impl Actor {
    /// Notes the image in `job.pb`: while it is named there, it stays in the cache.
    pub(super) async fn note_image(&self, found: &stage::Found) -> Result<(), String> {
        let (dir, images) = (self.dir.clone(), found.images().to_vec());
        let written = tokio::task::spawn_blocking(move || {
            let mut job = dir.spec()?;
            job.images = with_new(images, job.images);
            dir.write_spec(&job)?;
            Ok::<_, knoc_contract::jobdir::JobDirError>(())
        });
        match written.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("write the job file: {}", chain(&error))),
            Err(error) => Err(format!("write the job file: {}", chain(&error))),
        }
    }
}

/// PURE: the images of the job file with the new ones, which come first. The older ones of a container stay, so that they stay in
/// the cache: it may still run with one of them.
fn with_new(new: Vec<pb::ResolvedImage>, known: Vec<pb::ResolvedImage>) -> Vec<pb::ResolvedImage> {
    let mut all = new;
    for image in known {
        let same = |one: &&pb::ResolvedImage| {
            (&one.container, &one.volume) == (&image.container, &image.volume)
        };
        let known = all.iter().filter(same).any(|one| one.path == image.path);
        if !known && all.iter().filter(same).count() < KEPT_IMAGES {
            all.push(image);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_images_of_a_container_stay_in_the_cache_behind_the_new_one() {
        let image = |container: &str, path: &str| pb::ResolvedImage {
            container: container.to_owned(),
            path: path.to_owned(),
            ..pb::ResolvedImage::default()
        };
        let mut all = vec![image("a", "0"), image("b", "0")];
        for number in 1..20 {
            all = with_new(vec![image("a", &number.to_string())], all);
        }
        assert_eq!(all.first(), Some(&image("a", "19")));
        assert!(all.contains(&image("b", "0")));
        assert_eq!(all.len(), KEPT_IMAGES + 1);
        let again = with_new(vec![image("a", "18")], all);
        assert_eq!((&*again[0].path, &*again[1].path), ("18", "19"));
        assert_eq!(again.len(), KEPT_IMAGES + 1);
    }
}
