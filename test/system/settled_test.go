package system_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// A workload is stopped during a restart of its agent and a rotation. It counts until it
// has read its replacement or is killed, even if that takes longer than an agent waits for
// unknown workloads.
func TestStoppedThroughRestart(t *testing.T) {
	t.Parallel()
	memory, err := os.MkdirTemp("/dev/shm", "renewd-system")
	if err != nil {
		t.Fatalf("this test needs the memory file system /dev/shm: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(memory) })
	run(t, "stopped.txtar", map[string]string{"MEMORY": memory})
}

// watch is a workload with the reference client. It writes the ID of the authority that
// signed its X.509-SVID to a file.
func watch(socket, file string) error {
	source, err := workloadapi.NewX509Source(context.Background(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		return err
	}
	defer source.Close()
	for ; ; <-source.Updated() {
		svid, err := source.GetX509SVID()
		if err != nil {
			return err
		}
		top := svid.Certificates[len(svid.Certificates)-1]
		if err := os.WriteFile(file+".new", []byte(hex.EncodeToString(top.AuthorityKeyId)), 0o600); err != nil {
			return err
		}
		if err := os.Rename(file+".new", file); err != nil {
			return err
		}
	}
}

// authorityStatus is the status of an authority on one node.
type authorityStatus struct {
	ID      string
	Held    int
	Streams int  `json:"streams_waiting"`
	Safe    bool `json:"safe_to_remove"`
}

// readStatus returns an authority's status from the agent with its metrics on a port, zero
// if the agent does not answer.
func readStatus(ts *testscript.TestScript, id, port string) authorityStatus {
	if ts.Exec("agent", "status", "-o", "json", "-url", "http://127.0.0.1:"+port) != nil {
		return authorityStatus{}
	}
	var status struct{ Authorities []authorityStatus }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &status))
	for _, a := range status.Authorities {
		if a.ID == id {
			return a
		}
	}
	return authorityStatus{}
}

// waitStatus waits until ok returns true for an agent's status of an authority.
func waitStatus(ts *testscript.TestScript, id, port, what string, ok func(authorityStatus) bool) {
	for deadline := time.Now().Add(waitLimit); ; time.Sleep(100 * time.Millisecond) {
		a := readStatus(ts, id, port)
		if ok(a) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s on the node of port %s: not %s within %v: %+v", id, port, what, waitLimit, a)
		}
	}
}

// settled ID PORT... waits until the X.509 authority is safe to remove on each of the agents
// with their metrics on these ports. With ! it must be safe on none of them now.
func settled(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: [!] settled ID PORT...")
	}
	for _, port := range args[1:] {
		if !neg {
			waitStatus(ts, args[0], port, "safe to remove", func(a authorityStatus) bool { return a.Safe })
		} else if a := readStatus(ts, args[0], port); a.ID == "" || a.Safe {
			ts.Fatalf("%s on the node of port %s is to be unsafe to remove: %+v", args[0], port, a)
		}
	}
}

// held N ID PORT waits until an agent holds N SVIDs of an X.509 authority.
func held(ts *testscript.TestScript, neg bool, args []string) {
	waitCount(ts, args, "held", func(a authorityStatus) int { return a.Held })
}

// unread N ID PORT waits until N workloads of an agent may use SVIDs of an X.509
// authority that is tainted.
func unread(ts *testscript.TestScript, neg bool, args []string) {
	waitCount(ts, args, "unread", func(a authorityStatus) int { return a.Streams })
}

func waitCount(ts *testscript.TestScript, args []string, what string, of func(authorityStatus) int) {
	if len(args) != 3 {
		ts.Fatalf("usage: %s N ID PORT", what)
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	waitStatus(ts, args[1], args[2], fmt.Sprint(n, " ", what), func(a authorityStatus) bool { return a.ID != "" && of(a) == n })
}
