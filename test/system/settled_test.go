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

// A workload that is stopped through a restart of its agent and a rotation counts
// until it has read its replacement, or is killed: longer than an agent waits for
// workloads that it knows nothing of.
func TestStoppedThroughRestart(t *testing.T) {
	t.Parallel()
	memory, err := os.MkdirTemp("/dev/shm", "renewd-system")
	if err != nil {
		t.Fatalf("this test needs the memory file system /dev/shm: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(memory) })
	run(t, "stopped.txtar", map[string]string{"MEMORY": memory})
}

// watch is a workload with the reference client, until it is ended. It keeps the ID of
// the authority that signed its X.509-SVID in a file.
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

// onNode is what an agent says about an authority.
type onNode struct {
	ID      string
	Held    int
	Streams int  `json:"streams_waiting"`
	Safe    bool `json:"safe_to_remove"`
}

// readStatus asks the agent that has its metrics on a port. One that does not answer
// says nothing.
func readStatus(ts *testscript.TestScript, id, port string) onNode {
	if ts.Exec("agent", "status", "-o", "json", "-url", "http://127.0.0.1:"+port) != nil {
		return onNode{}
	}
	var status struct{ Authorities []onNode }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &status))
	for _, a := range status.Authorities {
		if a.ID == id {
			return a
		}
	}
	return onNode{}
}

// waitStatus waits until an agent says of an authority what it should.
func waitStatus(ts *testscript.TestScript, id, port, what string, ok func(onNode) bool) {
	for deadline := time.Now().Add(settleLimit); ; time.Sleep(100 * time.Millisecond) {
		a := readStatus(ts, id, port)
		if ok(a) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s on the node of port %s: not %s within %v: %+v", id, port, what, settleLimit, a)
		}
	}
}

// settled ID PORT... waits until each of the agents that have their metrics there says
// that the X.509 authority is safe to remove. With ! none of them says so now.
func settled(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: [!] settled ID PORT...")
	}
	for _, port := range args[1:] {
		if !neg {
			waitStatus(ts, args[0], port, "safe to remove", func(a onNode) bool { return a.Safe })
		} else if a := readStatus(ts, args[0], port); a.ID == "" || a.Safe {
			ts.Fatalf("%s on the node of port %s is to be unsafe to remove: %+v", args[0], port, a)
		}
	}
}

// held N ID PORT waits until an agent holds N SVIDs of an X.509 authority.
func held(ts *testscript.TestScript, neg bool, args []string) {
	waitCount(ts, args, "held", func(a onNode) int { return a.Held })
}

// unread N ID PORT waits until N workloads of an agent may use SVIDs of an X.509
// authority that is tainted.
func unread(ts *testscript.TestScript, neg bool, args []string) {
	waitCount(ts, args, "unread", func(a onNode) int { return a.Streams })
}

func waitCount(ts *testscript.TestScript, args []string, what string, of func(onNode) int) {
	if len(args) != 3 {
		ts.Fatalf("usage: %s N ID PORT", what)
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	waitStatus(ts, args[1], args[2], fmt.Sprint(n, " ", what), func(a onNode) bool { return a.ID != "" && of(a) == n })
}
