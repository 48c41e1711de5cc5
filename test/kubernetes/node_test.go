package kubernetes

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// nodeDirEnv names the temporary folder to the program in the node's namespaces.
const nodeDirEnv = "RENEWD_TEST_NODE_DIR"

const (
	nodeName    = "node-1"
	nodeIP      = "10.245.0.1"
	podCIDR     = "10.244.0.0/24"
	serviceCIDR = "10.96.0.0/24"
)

// runInNode runs this program again in new namespaces and in a cgroup of its own, waits, and
// removes the folder and the cgroup. All else ends with the first process of the PID
// namespace: processes, mounts and network.
func runInNode() (code int, err error) {
	if os.Getuid() != 0 {
		return 0, errors.New("KUBERNETES_BIN_DIR is set, but a node takes root: run the tests as root")
	}
	dir, err := os.MkdirTemp("", "renewd-k8s-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := buildPrograms(dir); err != nil {
		return 0, err
	}
	g, err := newCgroup(fmt.Sprintf("renewd-k8s-%d", os.Getpid()))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, g.remove()) }()
	if err := g.enter(); err != nil {
		return 0, err
	}

	// The parent-death signal is sent when the thread ends that started the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	child := exec.Command("/proc/self/exe", os.Args[1:]...)
	child.Env = append(os.Environ(), nodeDirEnv+"="+dir)
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS |
			syscall.CLONE_NEWIPC | syscall.CLONE_NEWCGROUP,
		Pdeathsig: syscall.SIGKILL,
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	// The root of the child's cgroup namespace is the cgroup that it begins in.
	if err := errors.Join(child.Start(), g.leave()); err != nil {
		return 0, fmt.Errorf("create the node's namespaces: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	select {
	case <-signals:
		child.Process.Kill()
		err = <-ended
	case err = <-ended:
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(1, exit.ExitCode()), nil
	}
	return 0, err
}

// hierarchy is one of this process's cgroup hierarchies.
type hierarchy struct {
	options string // of its mount: the controllers, or name=...; empty for cgroup v2
	root    string // where it is mounted
	dir     string // the folder of the process's cgroup
}

// hierarchies returns what /proc/self/cgroup lists, with the folders where they are mounted.
func hierarchies() ([]hierarchy, error) {
	cgroups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	mounted := make(map[string]string)
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		switch f[2] {
		case "cgroup2":
			mounted[""] = f[1]
		case "cgroup":
			for option := range strings.SplitSeq(f[3], ",") {
				mounted[option] = f[1]
			}
		}
	}
	var out []hierarchy
	for line := range strings.Lines(string(cgroups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		root, ok := mounted[strings.Split(f[1], ",")[0]]
		if !ok {
			return nil, fmt.Errorf("the cgroup hierarchy %q is not mounted", f[1])
		}
		out = append(out, hierarchy{f[1], root, filepath.Join(root, f[2])})
	}
	return out, nil
}

// cgroup is a new cgroup in each hierarchy.
type cgroup struct {
	name string
	all  []hierarchy
}

func newCgroup(name string) (*cgroup, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	g := &cgroup{name, all}
	for _, h := range all {
		if err := g.create(h); err != nil {
			return nil, errors.Join(fmt.Errorf("create a cgroup for the node: %w", err), g.remove())
		}
	}
	return g, nil
}

// unified says that the machine has cgroup v2 alone.
func (g *cgroup) unified() bool { return len(g.all) == 1 && g.all[0].options == "" }

// dir is the cgroup's folder: below this process's own one, or with cgroup v2 alone below the
// root, because only the root may have controllers for others beside processes of its own.
func (g *cgroup) dir(h hierarchy) string {
	if g.unified() {
		return filepath.Join(h.root, g.name)
	}
	return filepath.Join(h.dir, g.name)
}

func (g *cgroup) create(h hierarchy) error {
	dir := g.dir(h)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	switch {
	case g.unified():
		controllers, err := os.ReadFile(filepath.Join(h.root, "cgroup.controllers"))
		if err != nil {
			return err
		}
		enable := "+" + strings.Join(strings.Fields(string(controllers)), " +")
		return os.WriteFile(filepath.Join(h.root, "cgroup.subtree_control"), []byte(enable), 0o644)
	case slices.Contains(strings.Split(h.options, ","), "cpuset"):
		// A new cpuset is empty and takes no process.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(h.dir, file))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, file), value, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// enter and leave move this process. What it starts begins in its cgroup.
func (g *cgroup) enter() error {
	for _, h := range g.all {
		if err := move(g.dir(h)); err != nil {
			return fmt.Errorf("enter the node's cgroup: %w", errors.Join(err, g.leave()))
		}
	}
	return nil
}

func (g *cgroup) leave() error {
	var errs []error
	for _, h := range g.all {
		errs = append(errs, move(h.dir))
	}
	return errors.Join(errs...)
}

// remove removes the cgroup with all that containers left in it.
func (g *cgroup) remove() error {
	var errs []error
	for _, h := range g.all {
		errs = append(errs, removeCgroup(g.dir(h)))
	}
	return errors.Join(errs...)
}

func move(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644)
}

// removeCgroup removes a cgroup and those below it. The kernel needs a moment after the last
// process.
func removeCgroup(dir string) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var dirs []string
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		for _, dir := range slices.Backward(dirs) {
			err = errors.Join(err, syscall.Rmdir(dir))
		}
		if _, gone := os.Stat(dir); errors.Is(gone, fs.ErrNotExist) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("remove the node's cgroup: %w", err)
		}
	}
}

// The kernel's settings that a kubelet wants. It would change them for the whole machine, so it
// is shown files that have them.
var tunables = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// prepareNode makes the namespaces of this process a node: its own /proc, /sys with the
// cgroups, /run, /var and /etc/hosts, its host name, and a network of which nothing leaves.
func prepareNode(dir string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	m := &mounter{}
	m.mount("proc", "/proc", "proc", 0, "")
	m.mount("sysfs", "/sys", "sysfs", 0, "")
	m.mountCgroups(all)
	m.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
	for _, sub := range []string{"lib", "log", "tmp"} {
		m.do(os.MkdirAll(filepath.Join(dir, "var", sub), 0o755))
	}
	m.mount(filepath.Join(dir, "var"), "/var", "", syscall.MS_BIND, "")
	for name, value := range tunables {
		file := filepath.Join(dir, "sys", name)
		m.do(os.MkdirAll(filepath.Dir(file), 0o755))
		m.do(os.WriteFile(file, []byte(value+"\n"), 0o644))
		m.mount(file, filepath.Join("/proc/sys", name), "", syscall.MS_BIND, "")
	}
	hosts := filepath.Join(dir, "hosts")
	m.do(os.WriteFile(hosts, []byte("127.0.0.1 localhost\n"+nodeIP+" "+nodeName+"\n"), 0o644))
	m.mount(hosts, "/etc/hosts", "", syscall.MS_BIND, "")
	m.mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED, "")
	if m.err != nil {
		return m.err
	}
	if err := syscall.Sethostname([]byte(nodeName)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	for _, args := range []string{"link set lo up", "addr add " + nodeIP + "/32 dev lo"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
}

// mounter keeps the first error of a sequence of mounts.
type mounter struct{ err error }

func (m *mounter) do(err error) {
	if m.err == nil {
		m.err = err
	}
}

func (m *mounter) mount(source, target, fstype string, flags uintptr, data string) {
	if m.err == nil {
		if err := syscall.Mount(source, target, fstype, flags, data); err != nil {
			m.err = fmt.Errorf("mount %s at %s: %w", fstype, target, err)
		}
	}
}

const cgroupRoot = "/sys/fs/cgroup"

// mountCgroups mounts the hierarchies with this process's cgroups as their roots.
func (m *mounter) mountCgroups(all []hierarchy) {
	if len(all) == 1 && all[0].options == "" {
		m.mount("cgroup2", cgroupRoot, "cgroup2", 0, "")
		// With cgroup v2 a cgroup with processes cannot have controllers for others.
		m.do(os.Mkdir(filepath.Join(cgroupRoot, "init"), 0o755))
		m.do(move(filepath.Join(cgroupRoot, "init")))
		return
	}
	m.mount("tmpfs", cgroupRoot, "tmpfs", 0, "mode=755")
	for _, h := range all {
		target := filepath.Join(cgroupRoot, filepath.Base(h.root))
		m.do(os.Mkdir(target, 0o755))
		switch {
		case h.options == "":
			m.mount("cgroup2", target, "cgroup2", 0, "")
		case strings.HasPrefix(h.options, "name="):
			m.mount("cgroup", target, "cgroup", 0, "none,"+h.options)
		default:
			m.mount("cgroup", target, "cgroup", 0, h.options)
		}
	}
}

// logTails returns the end of each component's log.
func logTails(dir string) string {
	var out strings.Builder
	files, _ := filepath.Glob(filepath.Join(dir, "log", "*.log"))
	for _, name := range files {
		fmt.Fprintf(&out, "--- %s\n", filepath.Base(name))
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		var last []string
		for s := bufio.NewScanner(f); s.Scan(); {
			if last = append(last, s.Text()); len(last) > 40 {
				last = last[1:]
			}
		}
		f.Close()
		out.WriteString(strings.Join(last, "\n") + "\n")
	}
	return out.String()
}
