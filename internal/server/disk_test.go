package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
)

// disk mounts a small file system.
func disk(t *testing.T, size string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rn")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		t.Skipf("mounting a file system is not allowed, run as root: %v", err)
	}
	t.Cleanup(func() { check(t, syscall.Unmount(dir, 0)) })
	return dir
}

// fillUp leaves no room for anything.
func fillUp(t *testing.T, dir string) (path string) {
	t.Helper()
	path = filepath.Join(dir, "filler")
	f, err := os.Create(path)
	check(t, err)
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return path
}

// TestFullDisk: an SVID that cannot be recorded is not handed out, no change is half
// done, and reads succeed. Everything recovers when there is room again.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east", "west")
	dir := disk(t, "8m")
	c.DataDir = filepath.Join(dir, "data")
	r := run(t, c)
	ctx, s := t.Context(), scope("east")

	const n = 500
	var entries []*api.Entry
	ids := make([]string, n)
	for i := range ids {
		ids[i] = fmt.Sprintf("e%03d", i)
		entries = append(entries, &api.Entry{Id: ids[i], SpiffeId: "spiffe://example.org/" + ids[i], Selectors: []*api.Selector{{Type: "unix", Value: "uid:0"}}})
	}
	_, err := r.api.ApplyEntries(ctx, &api.ApplyEntriesRequest{Scope: s, Entries: entries})
	check(t, err)
	a := r.join("east")
	a.workload(ids[0])

	before, published := r.keysets("east"), r.Published()
	filler := fillUp(t, dir)
	// The store uses up its own free pages first.
	for i := 1; err == nil; i++ {
		if i == n {
			t.Fatal("the disk is not full")
		}
		_, err = a.mint(ids[i])
	}
	unavailable := func(err error) {
		t.Helper()
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "failed to record") {
			t.Errorf("minting: %v", err)
		}
	}
	unavailable(err)
	_, err = a.mint(ids...)
	unavailable(err)
	// The record of a JWT-SVID is so small that there may be a free page for it.
	token, err := a.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: ids[0], Audience: []string{"a"}})
	if err != nil {
		unavailable(err)
	}
	clear := func(what string, err error) {
		t.Helper()
		if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "no space left on device") || !strings.Contains(err.Error(), "nothing was changed") {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = r.api.PrepareKeyset(ctx, &api.PrepareKeysetRequest{Scope: s})
	clear("prepare", err)
	longer := entries[:1:1]
	for i := range n {
		longer = append(longer, &api.Entry{Id: fmt.Sprintf("f%03d", i), SpiffeId: "spiffe://example.org/f", Selectors: []*api.Selector{{Type: "unix", Value: strings.Repeat("x", 500)}}})
	}
	replace := &api.ApplyEntriesRequest{Scope: s, Entries: longer, Remove: new(int64(n - 1))}
	_, err = r.api.ApplyEntries(ctx, replace)
	clear("entries", err)

	// Reads succeed, and no change is half done.
	after := r.keysets("east")
	if len(after.GetKeysets()) != 1 || after.GetKeysets()[0].GetId() != before.GetKeysets()[0].GetId() || after.GetSequence() != published.Sequence {
		t.Errorf("keysets: %v", after)
	}
	list, err := r.api.ListEntries(ctx, &api.ListEntriesRequest{Scope: s})
	check(t, err)
	if len(list.GetEntries()) != n {
		t.Errorf("%d entries", len(list.GetEntries()))
	}
	if b, _ := a.bundle(); b.GetSequenceNumber() != published.Sequence {
		t.Errorf("bundle: %v", b)
	}
	text := get(t, http.DefaultClient, "http://"+r.address("metrics.address")+"/metrics", http.StatusOK)
	if !bytes.Contains(text, fmt.Appendf(nil, `spirl_server_mint_svid_total{status_code="Unavailable",svid_type="x509"} %d`, n+1)) {
		t.Error("failed mints are not counted")
	}

	check(t, os.Remove(filler))
	all, err := a.mint(ids...)
	check(t, err)
	if len(all) != n {
		t.Errorf("%d SVIDs", len(all))
	}
	a.token(ids[0])
	r.rotate("east")
	r.rotate("west")
	r.join("west")
	_, err = r.api.ApplyEntries(ctx, replace)
	check(t, err)
	live := r.keysets("east").GetKeysets()[0].GetLiveX509Svids()
	if live != n+1 {
		t.Errorf("%d SVIDs are live", live)
	}
	r.stop()
	r = run(t, c)
	if got := r.keysets("east").GetKeysets(); len(got) != 2 || got[0].GetLiveX509Svids() != live {
		t.Errorf("after a restart: %v", got)
	} else if got[0].GetJwtLatestExpiry().GetSeconds() < token.GetSvid().GetExpiresAt() {
		t.Errorf("handed out JWT-SVID %v, which is not known: %v", token, got[0])
	}
	r.stop()
}
