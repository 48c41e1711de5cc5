package kubernetes

import (
	"flag"
	"fmt"
	"os"
	"testing"
	"time"
)

// node is the cluster that all tests share, nil where there is none.
var node *cluster

// TestMain starts this program again in namespaces of its own, which are the node: there it
// brings the cluster up and runs the tests. Outside it only waits and removes what is left.
func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	binDir := os.Getenv("KUBERNETES_BIN_DIR")
	if binDir == "" {
		return m.Run() // every test skips
	}
	dir := os.Getenv(nodeDirEnv)
	if dir == "" {
		code, err := runInNode()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return code
	}
	began := time.Now()
	c, err := start(dir, binDir)
	if err != nil {
		fmt.Fprintf(os.Stderr, "start the cluster: %v\n%s", err, logTails(dir))
		return 1
	}
	fmt.Printf("the cluster is up after %.1fs\n", time.Since(began).Seconds())
	node = c
	code := m.Run()
	if code != 0 {
		fmt.Fprint(os.Stderr, logTails(dir))
	}
	return code
}

// onNode returns the cluster for a test.
func onNode(t *testing.T) *cluster {
	t.Helper()
	if node == nil {
		t.Skip("KUBERNETES_BIN_DIR is not set: run make test-k8s")
	}
	return node
}
