// Package kubernetes tests the programs in a real cluster of one node: kube-apiserver,
// kube-controller-manager, kube-scheduler, kube-proxy and kubelet as tools/kubernetes/go.mod
// pins them, etcd, containerd and runc. "make test-k8s" builds Kubernetes and runs the tests as
// root. Without KUBERNETES_BIN_DIR, the folder of these programs, they skip.
//
// The node is this test program, started again in new namespaces for processes, mounts, network,
// host name and cgroups (TestMain). Everything is in a temporary folder. When the program ends,
// the kernel ends all processes of the cluster with it, and with them its mounts and its network;
// the folder and the cgroup are removed. Nothing of the machine is changed: the kubelet is shown
// files in place of the kernel's settings that it would write. The tests have been run on a machine
// with cgroup v1; the node is made for cgroup v2, too.
//
// No image is pulled. The images are made of our static programs, as deploy/Dockerfile makes
// them, and of the command workload, which is also the pods' pause program. There is no DNS in
// the cluster: the agents' pods have the server's name in their hosts file. Kubernetes' own
// Service and ours work, with kube-proxy.
//
// On two cores Kubernetes takes a quarter of an hour to build, and three times that beside other
// work. Once built, the cluster is up in 10 to 20 seconds and takes less than 1 GiB of memory. All tests take
// five minutes, most of them the rotation, in which the agent's pod is replaced in mid-wave.
//
// With -record FOLDER the tests write the cgroup file of each container and the kubelet's list
// of pods there, as test data of the attestors. With SPIRE_BIN_DIR they compare our selectors
// with those of spire-agent.
package kubernetes
