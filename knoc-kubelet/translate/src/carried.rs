//! PURE: which fields of a pod the translation reads, checked against their verdicts when this crate is compiled.
//!
//! Each Kubernetes type that the translation reads has one entry here. The entry destructures the type without a rest
//! pattern and puts each field into one of three groups:
//!
//! - `taken`: the translation reads it. The generated struct has only these fields, so the translation cannot read a
//!   field of another group, and the compiler reports a field that nothing reads as dead code.
//! - `elsewhere`: another part of the kubelet, or the API server, does what the field asks for.
//! - `left`: nothing reads it.
//!
//! A new field of Kubernetes therefore does not compile until it has a group. These do not compile either: a `left`
//! field whose verdict is "honoured", a `taken` field that is always rejected, and a field without a verdict.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1 as core,
    apimachinery::pkg::{
        api::resource::Quantity, apis::meta::v1::LabelSelector, util::intstr::IntOrString,
    },
};

use crate::verdict::fields::{has_verdict, is_admitted, is_honoured};

macro_rules! carried {
    ($(
        $(#[$doc:meta])*
        $name:ident of $of:ty, judged as $kind:literal {
            taken { $($taken:ident: $type:ty),* $(,)? }
            elsewhere { $($elsewhere:ident),* $(,)? }
            left { $($left:ident),* $(,)? }
        }
    )*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        #[allow(clippy::struct_field_names, reason = "the fields have Kubernetes' names")]
        pub(crate) struct $name<'a> {
            $(pub(crate) $taken: &'a $type,)*
        }

        impl<'a> From<&'a $of> for $name<'a> {
            fn from(all: &'a $of) -> Self {
                type Of = $of;
                let Of { $($taken,)* $($elsewhere: _,)* $($left: _,)* } = all;
                Self { $($taken,)* }
            }
        }

        const _: () = {
            $(
                assert!(has_verdict($kind, stringify!($taken)), concat!($kind, ".", stringify!($taken), " has no verdict"));
                assert!(
                    is_admitted($kind, stringify!($taken)),
                    concat!($kind, ".", stringify!($taken), " is always rejected, but it is translated"),
                );
            )*
            $(assert!(
                is_honoured($kind, stringify!($elsewhere)),
                concat!($kind, ".", stringify!($elsewhere), " is in the group `elsewhere`, but its verdict is not honoured"),
            );)*
            $(
                assert!(has_verdict($kind, stringify!($left)), concat!($kind, ".", stringify!($left), " has no verdict"));
                assert!(
                    !is_honoured($kind, stringify!($left)),
                    concat!($kind, ".", stringify!($left), " is honoured by its verdict, and yet dropped"),
                );
            )*
        };
    )*};
}

carried! {
    /// The `spec` of a pod. Elsewhere: the scheduler and admission place the pod, the API server mounts its token, the
    /// kubelet's pod status evaluates its readiness gates, and the kubelet looks up the variables of Services.
    PodSpec of core::PodSpec, judged as "PodSpec" {
        taken {
            active_deadline_seconds: Option<i64>,
            containers: Vec<core::Container>,
            dns_config: Option<core::PodDNSConfig>,
            dns_policy: Option<String>,
            ephemeral_containers: Option<Vec<core::EphemeralContainer>>,
            host_aliases: Option<Vec<core::HostAlias>>,
            host_network: Option<bool>,
            hostname: Option<String>,
            hostname_override: Option<String>,
            image_pull_secrets: Option<Vec<core::LocalObjectReference>>,
            init_containers: Option<Vec<core::Container>>,
            node_name: Option<String>,
            overhead: Option<BTreeMap<String, Quantity>>, resources: Option<core::ResourceRequirements>,
            restart_policy: Option<String>, security_context: Option<core::PodSecurityContext>,
            service_account_name: Option<String>,
            set_hostname_as_fqdn: Option<bool>,
            share_process_namespace: Option<bool>,
            subdomain: Option<String>,
            termination_grace_period_seconds: Option<i64>,
            volumes: Option<Vec<core::Volume>>,
        }
        elsewhere {
            affinity, automount_service_account_token, enable_service_links, node_selector, readiness_gates,
            service_account, tolerations,
        }
        left {
            eviction_responders, host_ipc, host_pid, host_users, os, preemption_policy, priority, priority_class_name, resource_claims,
            runtime_class_name, scheduler_name, scheduling_gates, scheduling_group, topology_spread_constraints,
        }
    }

    /// The `securityContext` of a pod.
    PodSecurityContext of core::PodSecurityContext, judged as "PodSecurityContext" {
        taken { fs_group: Option<i64>, run_as_group: Option<i64>, run_as_non_root: Option<bool>, run_as_user: Option<i64> }
        elsewhere {}
        left {
            app_armor_profile, fs_group_change_policy, se_linux_change_policy, se_linux_options,
            seccomp_profile, supplemental_groups, supplemental_groups_policy, sysctls, windows_options,
        }
    }

    /// An entry of `hostAliases`, which becomes a line of `/etc/hosts`.
    HostAlias of core::HostAlias, judged as "HostAlias" {
        taken { ip: String, hostnames: Option<Vec<String>> }
        elsewhere {}
        left {}
    }

    /// The pod's DNS configuration.
    DnsConfig of core::PodDNSConfig, judged as "PodDNSConfig" {
        taken {
            nameservers: Option<Vec<String>>,
            options: Option<Vec<core::PodDNSConfigOption>>,
            searches: Option<Vec<String>>,
        }
        elsewhere {}
        left {}
    }

    /// An option of the resolver library.
    DnsOption of core::PodDNSConfigOption, judged as "PodDNSConfigOption" {
        taken { name: Option<String>, value: Option<String> }
        elsewhere {}
        left {}
    }

    /// A container or init container.
    Container of core::Container, judged as "Container" {
        taken {
            args: Option<Vec<String>>,
            command: Option<Vec<String>>,
            env: Option<Vec<core::EnvVar>>,
            env_from: Option<Vec<core::EnvFromSource>>,
            image: Option<String>,
            image_pull_policy: Option<String>,
            lifecycle: Option<core::Lifecycle>,
            liveness_probe: Option<core::Probe>,
            name: String,
            ports: Option<Vec<core::ContainerPort>>,
            readiness_probe: Option<core::Probe>,
            resources: Option<core::ResourceRequirements>,
            restart_policy: Option<String>,
            restart_policy_rules: Option<Vec<core::ContainerRestartRule>>,
            security_context: Option<core::SecurityContext>,
            startup_probe: Option<core::Probe>,
            stdin: Option<bool>,
            stdin_once: Option<bool>,
            termination_message_path: Option<String>,
            termination_message_policy: Option<String>,
            tty: Option<bool>,
            volume_mounts: Option<Vec<core::VolumeMount>>,
            working_dir: Option<String>,
        }
        elsewhere {}
        left { resize_policy, volume_devices }
    }

    /// An ephemeral container.
    EphemeralContainer of core::EphemeralContainer, judged as "EphemeralContainer" {
        taken {
            args: Option<Vec<String>>,
            command: Option<Vec<String>>,
            env: Option<Vec<core::EnvVar>>,
            env_from: Option<Vec<core::EnvFromSource>>,
            image: Option<String>,
            image_pull_policy: Option<String>,
            name: String,
            security_context: Option<core::SecurityContext>,
            stdin: Option<bool>,
            stdin_once: Option<bool>,
            target_container_name: Option<String>,
            termination_message_path: Option<String>,
            termination_message_policy: Option<String>,
            tty: Option<bool>,
            volume_mounts: Option<Vec<core::VolumeMount>>,
            working_dir: Option<String>,
        }
        elsewhere {}
        left {
            lifecycle, liveness_probe, ports, readiness_probe, resize_policy, resources, restart_policy,
            restart_policy_rules, startup_probe, volume_devices,
        }
    }

    /// A rule about the exit codes of a container.
    RestartRule of core::ContainerRestartRule, judged as "ContainerRestartRule" {
        taken { action: String, exit_codes: Option<core::ContainerRestartRuleOnExitCodes> }
        elsewhere {}
        left {}
    }

    /// The exit codes of such a rule.
    ExitCodes of core::ContainerRestartRuleOnExitCodes, judged as "ContainerRestartRuleOnExitCodes" {
        taken { operator: String, values: Option<Vec<i32>> }
        elsewhere {}
        left {}
    }

    /// A port of a container, to which probes and hooks may refer by its name, and a port of the node may lead.
    ContainerPort of core::ContainerPort, judged as "ContainerPort" {
        taken {
            container_port: i32,
            host_ip: Option<String>,
            host_port: Option<i32>,
            name: Option<String>,
            protocol: Option<String>,
        }
        elsewhere {}
        left {}
    }

    /// A startup, liveness or readiness probe.
    Probe of core::Probe, judged as "Probe" {
        taken {
            exec: Option<core::ExecAction>,
            failure_threshold: Option<i32>,
            grpc: Option<core::GRPCAction>,
            http_get: Option<core::HTTPGetAction>,
            initial_delay_seconds: Option<i32>,
            period_seconds: Option<i32>,
            success_threshold: Option<i32>,
            tcp_socket: Option<core::TCPSocketAction>,
            termination_grace_period_seconds: Option<i64>,
            timeout_seconds: Option<i32>,
        }
        elsewhere {}
        left {}
    }

    /// The hooks of a container.
    Lifecycle of core::Lifecycle, judged as "Lifecycle" {
        taken {
            post_start: Option<core::LifecycleHandler>,
            pre_stop: Option<core::LifecycleHandler>,
            stop_signal: Option<String>,
        }
        elsewhere {}
        left {}
    }

    /// A hook.
    LifecycleHandler of core::LifecycleHandler, judged as "LifecycleHandler" {
        taken { exec: Option<core::ExecAction>, http_get: Option<core::HTTPGetAction>, sleep: Option<core::SleepAction> }
        elsewhere {}
        left { tcp_socket }
    }

    /// A command that a probe or hook runs in the container.
    ExecAction of core::ExecAction, judged as "ExecAction" {
        taken { command: Option<Vec<String>> }
        elsewhere {}
        left {}
    }

    /// A request that a probe or hook sends to the pod. It always goes to the pod itself, so its host is not read.
    HttpGetAction of core::HTTPGetAction, judged as "HTTPGetAction" {
        taken {
            http_headers: Option<Vec<core::HTTPHeader>>,
            path: Option<String>,
            port: IntOrString,
            scheme: Option<String>,
        }
        elsewhere {}
        left { host, protocol }
    }

    /// A header of such a request.
    HttpHeader of core::HTTPHeader, judged as "HTTPHeader" {
        taken { name: String, value: String }
        elsewhere {}
        left {}
    }

    /// A connection that a probe makes to the pod.
    TcpSocketAction of core::TCPSocketAction, judged as "TCPSocketAction" {
        taken { port: IntOrString }
        elsewhere {}
        left { host }
    }

    /// A call that a probe makes to the pod.
    GrpcAction of core::GRPCAction, judged as "GRPCAction" {
        taken { mode: Option<String>, port: i32, service: Option<String> }
        elsewhere {}
        left {}
    }

    /// A hook that only waits.
    SleepAction of core::SleepAction, judged as "SleepAction" {
        taken { seconds: i64 }
        elsewhere {}
        left {}
    }

    /// The `resources` of a container.
    ResourceRequirements of core::ResourceRequirements, judged as "ResourceRequirements" {
        taken { limits: Option<BTreeMap<String, Quantity>>, requests: Option<BTreeMap<String, Quantity>> }
        elsewhere {}
        left { claims }
    }

    /// The `securityContext` of a container.
    SecurityContext of core::SecurityContext, judged as "SecurityContext" {
        taken {
            privileged: Option<bool>,
            read_only_root_filesystem: Option<bool>,
            run_as_group: Option<i64>,
            run_as_non_root: Option<bool>,
            run_as_user: Option<i64>,
        }
        elsewhere {}
        left {
            allow_privilege_escalation, app_armor_profile, capabilities, proc_mount, se_linux_options,
            seccomp_profile, windows_options,
        }
    }

    /// The mount of a volume in a container.
    VolumeMount of core::VolumeMount, judged as "VolumeMount" {
        taken {
            mount_path: String,
            name: String,
            read_only: Option<bool>,
            sub_path: Option<String>,
            sub_path_expr: Option<String>,
        }
        elsewhere {}
        left { bind_mount_options, mount_propagation, recursive_read_only }
    }

    /// An environment variable.
    EnvVar of core::EnvVar, judged as "EnvVar" {
        taken { name: String, value: Option<String>, value_from: Option<core::EnvVarSource> }
        elsewhere {}
        left {}
    }

    /// The source of a variable's value.
    EnvVarSource of core::EnvVarSource, judged as "EnvVarSource" {
        taken {
            config_map_key_ref: Option<core::ConfigMapKeySelector>, field_ref: Option<core::ObjectFieldSelector>,
            file_key_ref: Option<core::FileKeySelector>, resource_field_ref: Option<core::ResourceFieldSelector>,
            secret_key_ref: Option<core::SecretKeySelector>,
        }
        elsewhere {}
        left {}
    }

    /// A variable in a file of a volume.
    FileKey of core::FileKeySelector, judged as "FileKeySelector" {
        taken { key: String, optional: Option<bool>, path: String, volume_name: String }
        elsewhere {}
        left {}
    }

    /// A key of a ConfigMap whose value a variable gets.
    ConfigMapKey of core::ConfigMapKeySelector, judged as "KeySelector" {
        taken { key: String, name: String, optional: Option<bool> }
        elsewhere {}
        left {}
    }

    /// A key of a Secret whose value a variable gets.
    SecretKey of core::SecretKeySelector, judged as "KeySelector" {
        taken { key: String, name: String, optional: Option<bool> }
        elsewhere {}
        left {}
    }

    /// An object all of whose keys become variables.
    EnvFromSource of core::EnvFromSource, judged as "EnvFromSource" {
        taken {
            config_map_ref: Option<core::ConfigMapEnvSource>,
            prefix: Option<String>,
            secret_ref: Option<core::SecretEnvSource>,
        }
        elsewhere {}
        left {}
    }

    /// A ConfigMap all of whose keys become variables.
    ConfigMapEnv of core::ConfigMapEnvSource, judged as "Reference" {
        taken { name: String, optional: Option<bool> }
        elsewhere {}
        left {}
    }

    /// A Secret all of whose keys become variables.
    SecretEnv of core::SecretEnvSource, judged as "Reference" {
        taken { name: String, optional: Option<bool> }
        elsewhere {}
        left {}
    }

    /// A field of the pod whose value a variable gets.
    EnvFieldRef of core::ObjectFieldSelector, judged as "EnvFieldRef" {
        taken { field_path: String }
        elsewhere {}
        left { api_version }
    }

    /// A resource of a container whose amount a variable or a file gets.
    ResourceFieldSelector of core::ResourceFieldSelector, judged as "ResourceFieldSelector" {
        taken { container_name: Option<String>, divisor: Option<Quantity>, resource: String }
        elsewhere {}
        left {}
    }

    /// A volume with its source.
    Volume of core::Volume, judged as "Volume" {
        taken {
            config_map: Option<core::ConfigMapVolumeSource>,
            downward_api: Option<core::DownwardAPIVolumeSource>,
            empty_dir: Option<core::EmptyDirVolumeSource>,
            host_path: Option<core::HostPathVolumeSource>,
            ephemeral: Option<core::EphemeralVolumeSource>,
            image: Option<core::ImageVolumeSource>,
            name: String,
            nfs: Option<core::NFSVolumeSource>,
            persistent_volume_claim: Option<core::PersistentVolumeClaimVolumeSource>,
            projected: Option<core::ProjectedVolumeSource>,
            secret: Option<core::SecretVolumeSource>,
        }
        elsewhere {}
        left {
            aws_elastic_block_store, azure_disk, azure_file, cephfs, cinder, csi, fc, flex_volume, flocker,
            gce_persistent_disk, git_repo, glusterfs, iscsi,
            photon_persistent_disk, portworx_volume, quobyte, rbd, scale_io, storageos, vsphere_volume,
        }
    }

    /// The source `emptyDir`: a folder that is empty at first.
    EmptyDir of core::EmptyDirVolumeSource, judged as "EmptyDirVolumeSource" {
        taken { medium: Option<String>, size_limit: Option<Quantity> }
        elsewhere {}
        left { mode }
    }

    /// The source `persistentVolumeClaim`: the volume that a claim is bound to.
    ClaimVolume of core::PersistentVolumeClaimVolumeSource, judged as "PersistentVolumeClaimVolumeSource" {
        taken { claim_name: String, read_only: Option<bool> }
        elsewhere {}
        left {}
    }

    /// The source `nfs`, of a pod or of a PersistentVolume.
    NfsVolume of core::NFSVolumeSource, judged as "NFSVolumeSource" {
        taken { path: String, read_only: Option<bool>, server: String }
        elsewhere {}
        left {}
    }

    /// The source `image`: the files of an image.
    ImageVolume of core::ImageVolumeSource, judged as "ImageVolumeSource" {
        taken { pull_policy: Option<String>, reference: Option<String> }
        elsewhere {}
        left {}
    }

    /// The source `hostPath`: a path of the compute node.
    HostPathVolume of core::HostPathVolumeSource, judged as "HostPathVolumeSource" {
        taken { path: String, type_: Option<String> }
        elsewhere {}
        left {}
    }

    /// The source `configMap`: the keys of a ConfigMap as files.
    ConfigMapVolume of core::ConfigMapVolumeSource, judged as "ConfigMapVolumeSource" {
        taken {
            default_mode: Option<i32>,
            items: Option<Vec<core::KeyToPath>>,
            name: String,
            optional: Option<bool>,
        }
        elsewhere {}
        left { default_user }
    }

    /// The source `secret`: the keys of a Secret as files.
    SecretVolume of core::SecretVolumeSource, judged as "SecretVolumeSource" {
        taken {
            default_mode: Option<i32>,
            items: Option<Vec<core::KeyToPath>>,
            optional: Option<bool>,
            secret_name: Option<String>,
        }
        elsewhere {}
        left { default_user }
    }

    /// A key of a ConfigMap or Secret that becomes a file.
    KeyToPath of core::KeyToPath, judged as "KeyToPath" {
        taken { key: String, mode: Option<i32>, path: String }
        elsewhere {}
        left { user }
    }

    /// The source `downwardAPI`: fields of the pod as files.
    DownwardApiVolume of core::DownwardAPIVolumeSource, judged as "DownwardAPIVolumeSource" {
        taken { default_mode: Option<i32>, items: Option<Vec<core::DownwardAPIVolumeFile>> }
        elsewhere {}
        left { default_user }
    }

    /// A file whose content is a field of the pod or a resource.
    DownwardApiFile of core::DownwardAPIVolumeFile, judged as "DownwardAPIVolumeFile" {
        taken {
            field_ref: Option<core::ObjectFieldSelector>,
            mode: Option<i32>,
            path: String,
            resource_field_ref: Option<core::ResourceFieldSelector>,
        }
        elsewhere {}
        left { user }
    }

    /// A field of the pod whose value a file gets.
    FileFieldRef of core::ObjectFieldSelector, judged as "FileFieldRef" {
        taken { field_path: String }
        elsewhere {}
        left { api_version }
    }

    /// The source `projected`: the files of several sources in one folder.
    ProjectedVolume of core::ProjectedVolumeSource, judged as "ProjectedVolumeSource" {
        taken { default_mode: Option<i32>, sources: Option<Vec<core::VolumeProjection>> }
        elsewhere {}
        left { default_user }
    }

    /// One source of a projected volume.
    VolumeProjection of core::VolumeProjection, judged as "VolumeProjection" {
        taken {
            cluster_trust_bundle: Option<core::ClusterTrustBundleProjection>,
            config_map: Option<core::ConfigMapProjection>,
            downward_api: Option<core::DownwardAPIProjection>,
            secret: Option<core::SecretProjection>,
            service_account_token: Option<core::ServiceAccountTokenProjection>,
        }
        elsewhere {}
        left { pod_certificate }
    }

    /// Certificates of trust anchors in a projected volume.
    TrustBundleProjection of core::ClusterTrustBundleProjection, judged as "ClusterTrustBundleProjection" {
        taken {
            label_selector: Option<LabelSelector>,
            name: Option<String>,
            optional: Option<bool>,
            path: String,
            signer_name: Option<String>,
        }
        elsewhere {}
        left { user }
    }

    /// A ConfigMap in a projected volume.
    ConfigMapProjection of core::ConfigMapProjection, judged as "ConfigMapVolumeSource" {
        taken { items: Option<Vec<core::KeyToPath>>, name: String, optional: Option<bool> }
        elsewhere {}
        left {}
    }

    /// A Secret in a projected volume.
    SecretProjection of core::SecretProjection, judged as "SecretProjection" {
        taken { items: Option<Vec<core::KeyToPath>>, name: String, optional: Option<bool> }
        elsewhere {}
        left {}
    }

    /// Fields of the pod in a projected volume.
    DownwardApiProjection of core::DownwardAPIProjection, judged as "DownwardAPIVolumeSource" {
        taken { items: Option<Vec<core::DownwardAPIVolumeFile>> }
        elsewhere {}
        left {}
    }

    /// A token of the pod's service account in a projected volume.
    TokenProjection of core::ServiceAccountTokenProjection, judged as "ServiceAccountTokenProjection" {
        taken { audience: Option<String>, expiration_seconds: Option<i64>, path: String }
        elsewhere {}
        left { user }
    }
}
