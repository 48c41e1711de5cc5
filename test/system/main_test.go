package system_test

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"
)

// built is the folder with the commands, which are built for these tests.
var built string

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "workload" {
		if err := watch(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	// The tests mostly wait for the programs, so more run at a time than there are cores,
	// unless -parallel says otherwise.
	if err := flag.Set("test.parallel", strconv.Itoa(max(6, runtime.GOMAXPROCS(0)))); err != nil {
		panic(err)
	}
	flag.Parse()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "renewd-bin-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		build := exec.Command("go", "build", "-o", dir, "../../cmd/server", "../../cmd/agent", "../../cmd/keysetctl")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the commands: %v\n%s", err, out)
			return 1
		}
		built = dir
		return m.Run()
	}())
}

// programs returns the folder with the commands. Another process has built them, and go
// test gives an earlier result again while nothing has changed that a test has read. So
// a test that uses them reads the folders that they are made of.
func programs() string {
	readSources()
	return built
}

var readSources = sync.OnceFunc(func() {
	err := filepath.WalkDir("../..", func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == ".git" {
			return filepath.SkipDir
		}
		return err
	})
	if err != nil {
		panic(err)
	}
})
