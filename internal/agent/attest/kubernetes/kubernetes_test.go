package kubernetes_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/agent/attest/cgroup"
	"github.com/renewd/renewd/internal/agent/attest/kubernetes"
	"github.com/renewd/renewd/internal/selector"
)

// webPod is what all containers of the pod web have.
var webPod = []string{
	"node-name:node-1", "ns:prod",
	"pod-image-count:2",
	"pod-image:registry.example.org/exporter:3",
	"pod-image:registry.example.org/exporter@sha256:" + strings.Repeat("3", 64),
	"pod-image:registry.example.org/web:1.2",
	"pod-image:registry.example.org/web@sha256:" + strings.Repeat("1", 64),
	"pod-init-image-count:2",
	"pod-init-image:registry.example.org/proxy:2",
	"pod-init-image:registry.example.org/proxy@sha256:" + strings.Repeat("2", 64),
	"pod-init-image:registry.example.org/web:1.2",
	"pod-init-image:registry.example.org/web@sha256:" + strings.Repeat("1", 64),
	"pod-label:app.kubernetes.io/version:1.2", "pod-label:app:web", "pod-label:pod-template-hash:6d4b75cb6d",
	"pod-name:web-6d4b75cb6d-hlq4v",
	"pod-owner-uid:ReplicaSet:5c1f4f2c-76b5-4a4e-9d0e-9a4b1c3f6a11", "pod-owner:ReplicaSet:web-6d4b75cb6d",
	"pod-uid:" + webUID, "sa:web",
}

// The selectors are those that SPIRE's k8s plugin (1.15.3, getSelectorValuesFromPodInfo
// and getSelectorValuesFromWorkloadContainerStatus) makes of the same list.
func TestSelectors(t *testing.T) {
	t.Parallel()
	image := func(name, tag, digit string) []string {
		return []string{"container-image:registry.example.org/" + name + ":" + tag, "container-image:registry.example.org/" + name + "@sha256:" + strings.Repeat(digit, 64)}
	}
	for name, tt := range map[string]struct {
		container cgroup.Container
		skip      bool // Config.SkipContainer
		want      []string
		err       string
	}{
		"one of two containers":             {inPod(webUID, "c"), false, slices.Concat(webPod, []string{"container-name:app"}, image("web", "1.2", "1")), ""},
		"the other":                         {inPod(webUID, "d"), false, slices.Concat(webPod, []string{"container-name:metrics"}, image("exporter", "3", "3")), ""},
		"an init container":                 {inPod(webUID, "a"), false, slices.Concat(webPod, []string{"container-name:migrate"}, image("web", "1.2", "1")), ""},
		"a native sidecar":                  {inPod(webUID, "b"), false, slices.Concat(webPod, []string{"container-name:proxy"}, image("proxy", "2", "2")), ""},
		"an ephemeral container":            {inPod(webUID, "e"), false, nil, ""},
		"the pod alone":                     {inPod(webUID, "c"), true, webPod, ""},
		"the pod alone, ephemeral":          {inPod(webUID, "e"), true, webPod, ""},
		"the pod alone, container unknown":  {inPod(webUID, "8"), true, webPod, ""},
		"next to the agent, pod not shown":  {inPod("", "c"), false, slices.Concat(webPod, []string{"container-name:app"}, image("web", "1.2", "1")), ""},
		"not a pod":                         {cgroup.Container{ID: id("c"), Runtime: "docker"}, false, nil, ""},
		"no container":                      {cgroup.Container{}, false, nil, ""},
		"container of another pod":          {inPod(newUID, "c"), false, nil, "is in pod " + newUID + ", and the kubelet reports it in pod " + webUID},
		"container unknown":                 {inPod(webUID, "8"), false, nil, "is not in the kubelet's list of pods after 5 attempts"},
		"the container before the restart":  {inPod(jobUID, "9"), false, nil, "is not in the kubelet's list of pods"},
		"container and pod unknown":         {inPod("5b2c3c7e-0000-4000-8000-000000000000", "8"), true, nil, "is not in the kubelet's list of pods"},
		"pod without container statuses":    {inPod(newUID, "8"), false, nil, "is not in the kubelet's list of pods"},
		"pod without statuses, pod alone":   {inPod(newUID, "8"), true, []string{"node-name:node-1", "ns:prod", "pod-image-count:0", "pod-init-image-count:0", "pod-label:app:web", "pod-name:new", "pod-uid:" + newUID, "sa:web"}, ""},
		"restarted, terminating, a sibling": {inPod(jobUID, "0"), false, []string{"container-image:registry.example.org/job:9", "container-image:registry.example.org/job@sha256:" + strings.Repeat("6", 64), "container-name:job", "node-name:node-1", "ns:batch", "pod-image-count:2", "pod-image:", "pod-image:registry.example.org/job:9", "pod-image:registry.example.org/job@sha256:" + strings.Repeat("6", 64), "pod-init-image-count:0", "pod-name:job-x", "pod-owner-uid:Job:7b4d13f0-38d6-4c79-8d5d-6f4f60c0b111", "pod-owner:Job:job", "pod-uid:" + jobUID, "sa:default"}, ""},
		"static pod":                        {inPod(staticUID, "f"), false, []string{"container-image:registry.example.org/kube-apiserver:v1.36.0", "container-image:registry.example.org/kube-apiserver@sha256:" + strings.Repeat("5", 64), "container-name:kube-apiserver", "node-name:node-1", "ns:kube-system", "pod-image-count:1", "pod-image:registry.example.org/kube-apiserver:v1.36.0", "pod-image:registry.example.org/kube-apiserver@sha256:" + strings.Repeat("5", 64), "pod-init-image-count:0", "pod-label:component:kube-apiserver", "pod-label:tier:control-plane", "pod-name:kube-apiserver-node-1", "pod-owner-uid:Node:e6a29b5d-1a1b-4f0e-8d58-0f6f2f6c1b11", "pod-owner:Node:node-1", "pod-uid:" + staticUID, "sa:"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				a := overPipes(t, newKubelet(answers(handwritten(t))), kubernetes.Config{SkipContainer: tt.skip})
				got, err := a.Selectors(t.Context(), tt.container)
				if err == nil != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				slices.Sort(tt.want)
				if got := values(t, got); !slices.Equal(got, tt.want) {
					t.Errorf("got  %q\nwant %q", got, tt.want)
				}
			})
		})
	}
}

// Of the kubelet's static pod and the API server's copy of it, the kubelet's counts. If a
// list has the copy alone, it names the other's UID.
func TestMirrorPod(t *testing.T) {
	t.Parallel()
	const status = `"status": {"containerStatuses": [{"name": "app", "containerID": "containerd://ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"}]}`
	const mirror = `{"metadata": {"name": "mirror", "uid": "` + webUID + `", "annotations": {"kubernetes.io/config.mirror": "` + staticUID + `"}}, ` + status + `}`
	const static = `{"metadata": {"name": "static", "uid": "` + staticUID + `"}, ` + status + `}`
	for items, want := range map[string]string{mirror: "pod-name:mirror", mirror + "," + static: "pod-name:static"} {
		synctest.Test(t, func(t *testing.T) {
			a := overPipes(t, newKubelet(answers([]byte(`{"items": [`+items+`]}`))), kubernetes.Config{})
			got, err := a.Selectors(t.Context(), inPod(staticUID, "f"))
			if err != nil || !has(got, want) {
				t.Errorf("got %v, %v, want %s", got, err, want)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		a := overPipes(t, newKubelet(answers([]byte(`{"items": [`+mirror+","+static+`]}`))), kubernetes.Config{})
		if got, err := a.Selectors(t.Context(), inPod("", "f")); err == nil || got != nil {
			t.Errorf("got %v of one of two pods", got)
		}
	})
}

// A pod that is too new for the list is waited for, with one request an interval.
func TestWaitsForNewPod(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newKubelet(answers(handwritten(t)))
		a := overPipes(t, k, kubernetes.Config{})
		start := time.Now()
		time.AfterFunc(1700*time.Millisecond, func() { k.set(answers(listOf(t, map[string]string{newUID: "8"}))) })
		got, err := a.Selectors(t.Context(), inPod(newUID, "8"))
		if err != nil || !has(got, "pod-name:pod-8") {
			t.Errorf("got %v, %v", got, err)
		}
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("took %s, want four intervals of 0.5 s", took)
		}
		requireCount(t, k, 5)
	})
}

// A caller's own deadline ends the wait.
func TestDeadlineEndsWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := overPipes(t, newKubelet(answers(handwritten(t))), kubernetes.Config{})
		ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
		defer cancel()
		start := time.Now()
		got, err := a.Selectors(ctx, inPod(newUID, "8"))
		if !errors.Is(err, context.DeadlineExceeded) || got != nil || time.Since(start) != 700*time.Millisecond {
			t.Errorf("after %s: %v, %v", time.Since(start), got, err)
		}
	})
}

// All callers share one request, and its answer is used again for MaxAge. A second before
// that, a caller starts the next request and does not wait for it.
func TestCallersShareRequests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		list := answers(handwritten(t))
		k := newKubelet(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(100 * time.Millisecond)
			list(w, r)
		})
		a := overPipes(t, k, kubernetes.Config{})
		attestAll := func() {
			var callers sync.WaitGroup
			for i := range 100 {
				callers.Go(func() {
					c := inPod(webUID, []string{"c", "d"}[i%2])
					if got, err := a.Selectors(t.Context(), c); err != nil || !has(got, "ns:prod") {
						t.Errorf("got %v, %v", got, err)
					}
				})
			}
			callers.Wait()
		}
		attestAll()
		requireCount(t, k, 1)
		time.Sleep(kubernetes.MaxAge - 1200*time.Millisecond)
		attestAll()
		requireCount(t, k, 1)
		time.Sleep(200 * time.Millisecond)
		start := time.Now()
		attestAll()
		if took := time.Since(start); took != 0 {
			t.Errorf("callers waited for %s", took)
		}
		time.Sleep(time.Second)
		attestAll()
		requireCount(t, k, 2)
		time.Sleep(kubernetes.MaxAge)
		attestAll()
		requireCount(t, k, 3)
	})
}

// A caller that leaves does not end the request of the others.
func TestCallerLeaves(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		list := answers(handwritten(t))
		k := newKubelet(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Second)
			list(w, r)
		})
		a := overPipes(t, k, kubernetes.Config{})
		impatient, cancel := context.WithCancel(t.Context())
		var callers sync.WaitGroup
		callers.Go(func() {
			if _, err := a.Selectors(impatient, inPod(webUID, "c")); !errors.Is(err, context.Canceled) {
				t.Errorf("the one that left: %v", err)
			}
		})
		synctest.Wait()
		callers.Go(func() {
			if got, err := a.Selectors(t.Context(), inPod(webUID, "c")); err != nil || !has(got, "ns:prod") {
				t.Errorf("the one that stayed: %v, %v", got, err)
			}
		})
		synctest.Wait()
		cancel()
		callers.Wait()
		requireCount(t, k, 1)
	})
}

// A changed label counts after MaxAge at the latest, and a pod that is gone is forgotten.
func TestChangesAreSeen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newKubelet(answers(listOf(t, map[string]string{newUID: "8"})))
		a := overPipes(t, k, kubernetes.Config{})
		if got, err := a.Selectors(t.Context(), inPod(newUID, "8")); err != nil || !has(got, "pod-label:app:8") {
			t.Fatalf("got %v, %v", got, err)
		}
		k.set(answers([]byte(strings.Replace(string(listOf(t, map[string]string{newUID: "8"})), `"app":"8"`, `"app":"changed"`, 1))))
		time.Sleep(kubernetes.MaxAge)
		if got, err := a.Selectors(t.Context(), inPod(newUID, "8")); err != nil || !has(got, "pod-label:app:changed") || has(got, "pod-label:app:8") {
			t.Errorf("got %v, %v", got, err)
		}
		k.set(answers(listOf(t, nil)))
		time.Sleep(kubernetes.MaxAge)
		if got, err := a.Selectors(t.Context(), inPod(newUID, "8")); err == nil || got != nil {
			t.Errorf("of a pod that is gone: %v", got)
		}
		k.set(fails(500, "down"))
		time.Sleep(kubernetes.MaxAge)
		if got, err := a.Selectors(t.Context(), inPod(newUID, "8")); err == nil || got != nil {
			t.Errorf("of a pod that is gone, kubelet down: %v", got)
		}
	})
}

// While the kubelet fails, a known container has its last selectors, with an error that
// says so, for HeldFor. An unknown one has none. Then the kubelet recovers.
func TestKubeletOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newKubelet(answers(handwritten(t)))
		a := overPipes(t, k, kubernetes.Config{})
		check := func(when, digit string, selectors bool, failure string) {
			t.Helper()
			got, err := a.Selectors(t.Context(), inPod(webUID, digit))
			if has(got, "ns:prod") != selectors || len(got) > 0 != selectors {
				t.Errorf("%s: got %v", when, got)
			}
			if err == nil != (failure == "") || err != nil && !strings.Contains(err.Error(), failure) {
				t.Errorf("%s: error %v, want %q", when, err, failure)
			}
		}
		check("at first", "c", true, "")
		k.set(fails(500, "the kubelet is down"))
		check("within MaxAge", "c", true, "")
		time.Sleep(kubernetes.MaxAge)
		check("after MaxAge", "c", true, "selectors of the pod are 6s old")
		check("an unknown container", "8", false, "the kubelet is down")
		time.Sleep(kubernetes.HeldFor - kubernetes.MaxAge - time.Second)
		check("within HeldFor", "c", true, "the kubelet is down")
		time.Sleep(2 * time.Second)
		check("after HeldFor", "c", false, "the kubelet is down")
		k.set(answers(handwritten(t)))
		check("recovered", "c", true, "")
	})
}

// A kubelet that hangs delays the callers of known containers by two seconds, and the others
// until the request ends. When it answers, it is asked as before.
func TestKubeletHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newKubelet(answers(handwritten(t)))
		a := overPipes(t, k, kubernetes.Config{})
		if _, err := a.Selectors(t.Context(), inPod(webUID, "c")); err != nil {
			t.Fatal(err)
		}
		k.set(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		time.Sleep(kubernetes.MaxAge)
		var callers sync.WaitGroup
		attest := func(digit string, took time.Duration, selectors bool, failure string) {
			callers.Go(func() {
				start := time.Now()
				got, err := a.Selectors(t.Context(), inPod(webUID, digit))
				if time.Since(start) != took || has(got, "ns:prod") != selectors || err == nil || !strings.Contains(err.Error(), failure) {
					t.Errorf("container %s after %s: %v, %v", digit, time.Since(start), got, err)
				}
			})
		}
		attest("c", 2*time.Second, true, "selectors of the pod are 8s old: no answer of the kubelet within 2s")
		attest("8", 10*time.Second, false, "no answer within 10s")
		callers.Wait()
		requireCount(t, k, 2)
		k.set(answers(handwritten(t)))
		if got, err := a.Selectors(t.Context(), inPod(webUID, "c")); err != nil || !has(got, "ns:prod") {
			t.Errorf("got %v, %v", got, err)
		}
	})
}

// Answers that are not a list of pods are errors, nobody has selectors, and nothing of them
// is kept.
func TestBadAnswers(t *testing.T) {
	t.Parallel()
	list := string(handwritten(t))
	big := list[:len(list)-len("\n ]\n}")] + `, {"metadata": {"name": "` + strings.Repeat("x", 11<<20) + `"}}]}`
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		want   string
	}{
		"401":                    {fails(401, "Unauthorized"), `401 Unauthorized, "Unauthorized": check that the kubelet has readOnlyPort`},
		"403":                    {fails(403, "Forbidden (user=system:anonymous, verb=get, resource=nodes, subresource(s)=[pods proxy])"), "subresource(s)=[pods proxy]"},
		"404":                    {fails(404, "404 page not found"), "404 Not Found"},
		"503, long":              {fails(503, strings.Repeat("x", 1000)), `"` + strings.Repeat("x", 300) + `"`},
		"a redirect":             {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }, "302 Found"},
		"nothing":                {answers(nil), "the answer cannot be read: unexpected EOF"},
		"HTML":                   {answers([]byte("<html></html>")), "it is not a JSON object"},
		"noise":                  {answers([]byte("\x00\xff\xfe{}")), "it is not a JSON object"},
		"a list":                 {answers([]byte("[]")), "it is not a JSON object"},
		"another object":         {answers([]byte(`{"kind": "Status"}`)), "it has no items"},
		"items of another type":  {answers([]byte(`{"items": {"a": 1}}`)), "its items are not a list"},
		"pods of another type":   {answers([]byte(`{"items": ["a"]}`)), "pod 0: json: cannot unmarshal string"},
		"fields of another type": {answers([]byte(`{"items": [{"metadata": {"labels": {"a": 1}}}]}`)), "cannot unmarshal number"},
		"nested deeply":          {answers([]byte(`{"items": [` + strings.Repeat("[", 100_000))), "exceeded max depth"},
		"cut off":                {answers([]byte(list[:len(list)/2])), "unexpected EOF"},
		"cut off before the end": {answers([]byte(strings.TrimRight(list, "}\n"))), "unexpected EOF"},
		"11 MB":                  {answers([]byte(big)), "the answer is longer than 10 MB"},
		"11 MB of one token":     {answers([]byte(`{"a": "` + strings.Repeat("x", 11<<20))), "the answer is longer than 10 MB"},
		"no answer":              {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "no answer within 10s: check that the kubelet"},
		"an answer that never ends": {func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, `{"items": [`)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, "the answer did not end within 10s"},
		"connection closed": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF: check that the kubelet"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				k := newKubelet(tt.answer)
				a := overPipes(t, k, kubernetes.Config{})
				for range 2 { // the second time nothing is kept either
					got, err := a.Selectors(t.Context(), inPod(webUID, "c"))
					if err == nil || !strings.Contains(err.Error(), tt.want) {
						t.Errorf("error %v\nwant %q", err, tt.want)
					}
					if err != nil && (len(err.Error()) > 700 || !strings.Contains(err.Error(), "kubelet http://127.0.0.1:10255/pods: ")) {
						t.Errorf("error of %d bytes: %v", len(err.Error()), err)
					}
					if got != nil {
						t.Errorf("got %v", got)
					}
				}
				requireCount(t, k, 2)
				k.set(answers([]byte(list)))
				if got, err := a.Selectors(t.Context(), inPod(webUID, "c")); err != nil || !has(got, "ns:prod") {
					t.Errorf("after a good answer: %v, %v", got, err)
				}
			})
		})
	}
}

// An empty list is a list, in both of its forms.
func TestEmptyList(t *testing.T) {
	t.Parallel()
	for _, list := range []string{`{"items": []}`, `{"items": null}`, `{"kind": "PodList", "metadata": {"a": [1, {}]}, "items": [], "x": 1}`} {
		synctest.Test(t, func(t *testing.T) {
			a := overPipes(t, newKubelet(answers([]byte(list))), kubernetes.Config{})
			if _, err := a.Selectors(t.Context(), inPod(webUID, "c")); err == nil || !strings.Contains(err.Error(), "is not in the kubelet's list") {
				t.Errorf("%s: %v", list, err)
			}
		})
	}
}

// Close ends attestations that wait.
func TestClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := overPipes(t, newKubelet(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }), kubernetes.Config{})
		var callers sync.WaitGroup
		callers.Go(func() {
			if got, err := a.Selectors(t.Context(), inPod(webUID, "c")); err == nil || got != nil {
				t.Errorf("got %v, %v", got, err)
			}
		})
		synctest.Wait()
		start := time.Now()
		a.Close()
		callers.Wait()
		if took := time.Since(start); took != 0 {
			t.Errorf("took %s", took)
		}
		if _, err := a.Selectors(t.Context(), inPod(webUID, "c")); err == nil {
			t.Error("attested after Close")
		}
	})
}

// The kubelet is authenticated by its CA and its name, and authenticates the agent by
// token or certificate.
func TestTLS(t *testing.T) {
	t.Parallel()
	list := answers(handwritten(t))
	ca, otherCA := newAuthority(t), newAuthority(t)
	token := bearer("token-1", list)
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		names  []string
		change func(*kubernetes.Config)
		want   string // of the error
	}{
		"any name of 127.0.0.1": {token, []string{"node-1"}, func(*kubernetes.Config) {}, ""},
		"its node's name":       {token, []string{"node-1"}, func(c *kubernetes.Config) { c.NodeName, c.KubeletHost = "node-1", "127.0.0.1" }, ""},
		"its address":           {token, []string{"127.0.0.1"}, func(c *kubernetes.Config) { c.KubeletHost = "127.0.0.1" }, ""},
		"another node's name":   {token, []string{"node-2"}, func(c *kubernetes.Config) { c.NodeName, c.KubeletHost = "node-1", "127.0.0.1" }, "not node-1: set node_name to a name in the kubelet's certificate"},
		"another CA":            {token, []string{"node-1"}, func(c *kubernetes.Config) { c.KubeletCAFile = otherCA.file }, ": give the CA of the kubelet's certificate in kubelet_ca_file"},
		"another CA and name": {token, []string{"node-1"}, func(c *kubernetes.Config) {
			c.KubeletCAFile, c.NodeName, c.KubeletHost = otherCA.file, "node-1", "127.0.0.1"
		}, ": give the CA of the kubelet's certificate"},
		"not verified":          {token, []string{"node-2"}, func(c *kubernetes.Config) { c.KubeletCAFile, c.SkipKubeletVerification = "", true }, ""},
		"no CA file":            {token, nil, func(c *kubernetes.Config) { c.KubeletCAFile = "/missing/ca.crt" }, "read the kubelet's CA file: open /missing/ca.crt: no such file"},
		"CA file without a CA":  {token, nil, func(c *kubernetes.Config) { c.KubeletCAFile = c.TokenFile }, "has no certificate in PEM: give the CA"},
		"no token file":         {token, nil, func(c *kubernetes.Config) { c.TokenFile = "/missing/token" }, "read the token: open /missing/token: no such file"},
		"no token":              {token, nil, func(c *kubernetes.Config) { c.TokenFile = "" }, `401 Unauthorized, "Unauthorized": give a token of this cluster's API server in token_file`},
		"anonymous":             {list, nil, func(c *kubernetes.Config) { c.TokenFile = "" }, ""},
		"another token":         {bearer("token-2", list), nil, func(*kubernetes.Config) {}, "401 Unauthorized"},
		"not allowed":           {fails(403, "Forbidden"), nil, func(*kubernetes.Config) {}, "allow get on the resource nodes/pods (Kubernetes 1.33 and newer) or nodes/proxy (older)"},
		"client certificate":    {clientCertificate("agent", list), nil, func(c *kubernetes.Config) { c.CertificateFile, c.PrivateKeyFile = ca.client("agent") }, ""},
		"another CA's client":   {list, nil, func(c *kubernetes.Config) { c.CertificateFile, c.PrivateKeyFile = otherCA.client("agent") }, "check that kubelet_host"},
		"no client certificate": {list, nil, func(c *kubernetes.Config) { c.CertificateFile, c.PrivateKeyFile = "/missing/a", "/missing/b" }, "read the client certificate: open /missing/a"},
		"a key of another": {list, nil, func(c *kubernetes.Config) {
			c.CertificateFile, _ = ca.client("a")
			_, c.PrivateKeyFile = ca.client("b")
		}, "private key does not match"},
		"a file without end":      {token, nil, func(c *kubernetes.Config) { c.TokenFile = "/dev/zero" }, "/dev/zero is larger than 1048576 bytes"},
		"nobody listens":          {token, nil, func(c *kubernetes.Config) { c.KubeletPort = closedPort(t) }, "connection refused: check that kubelet_host (or node_name) and kubelet_port name this node's kubelet"},
		"not the kubelet's TLS":   {token, nil, func(c *kubernetes.Config) { c.KubeletPort = plainPort(t) }, "check that kubelet_host"},
		"read-only, not on":       {token, nil, func(c *kubernetes.Config) { c.KubeletReadOnlyPort = closedPort(t) }, "check that the kubelet has readOnlyPort"},
		"read-only, in plaintext": {token, nil, func(c *kubernetes.Config) { c.KubeletReadOnlyPort = plainPort(t) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := overTLS(t, newKubelet(tt.answer), ca, tt.names...)
			tt.change(&cfg)
			got, err := attestOnce(t, cfg, inPod(webUID, "c"))
			if err == nil != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v\nwant %q", err, tt.want)
			}
			if has(got, "ns:prod") != (err == nil) {
				t.Errorf("got %v", got)
			}
			if err != nil && (strings.Contains(err.Error(), "token-1") || strings.Contains(err.Error(), "BEGIN")) {
				t.Errorf("a secret in %v", err)
			}
		})
	}
}

// closedPort returns a port of 127.0.0.1 on which nobody listens.
func closedPort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// plainPort returns a port of 127.0.0.1 on which a kubelet listens without TLS.
func plainPort(t *testing.T) int {
	t.Helper()
	srv := httptest.NewServer(answers(handwritten(t)))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().(*net.TCPAddr).Port
}

// The files are reloaded for each request: the kubelet replaces the token, and others
// the certificates.
func TestFilesAreReloaded(t *testing.T) {
	t.Parallel()
	list := answers(handwritten(t))
	ca, nextCA := newAuthority(t), newAuthority(t)
	k := newKubelet(bearer("token-1", list))
	cfg := overTLS(t, k, ca, "node-1")
	a, err := kubernetes.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	replace := func(path, with string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(with), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string, ok bool) {
		t.Helper()
		if err := a.Check(t.Context()); err == nil != ok {
			t.Errorf("%s: %v", when, err)
		}
	}
	check("at first", true)
	k.set(bearer("token-2", list))
	check("before the token is replaced", false)
	replace(cfg.TokenFile, "token-2")
	check("after the token was replaced", true)
	good, err := os.ReadFile(ca.file)
	if err != nil {
		t.Fatal(err)
	}
	next, err := os.ReadFile(nextCA.file)
	if err != nil {
		t.Fatal(err)
	}
	replace(ca.file, string(next))
	check("another CA", false)
	replace(ca.file, string(next)+string(good))
	check("both", true)
}

// ns-label comes from the API server, as in SPIRE 1.15.3. Without an answer its selectors
// alone are missing.
func TestNamespaceLabels(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	api := newKubelet(bearer("token-1", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/namespaces/prod" || !strings.Contains(r.Header.Get("Accept"), "PartialObjectMetadata") {
			http.NotFound(w, r)
			return
		}
		fmt.Fprint(w, `{"kind": "PartialObjectMetadata", "metadata": {"name": "prod", "labels": {"kubernetes.io/metadata.name": "prod", "team": "payments"}}}`)
	}))
	cfg := overTLS(t, newKubelet(answers(handwritten(t))), ca, "node-1")
	server := overTLS(t, api, ca, "127.0.0.1")
	cfg.NamespaceLabels, cfg.APIServer, cfg.APIServerCAFile = true, fmt.Sprint("127.0.0.1:", server.KubeletPort), ca.file
	a, err := kubernetes.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for range 3 {
		got, err := a.Selectors(t.Context(), inPod(webUID, "c"))
		if err != nil || !has(got, "ns-label:team:payments") || !has(got, "ns-label:kubernetes.io/metadata.name:prod") {
			t.Errorf("got %v, %v", got, err)
		}
		var given []string
		for _, s := range got {
			given = append(given, s.String())
		}
		if err := selector.Compare("k8s", given); err != nil {
			t.Error(err)
		}
	}
	requireCount(t, api, 1)
	got, err := a.Selectors(t.Context(), inPod(jobUID, "0"))
	if err == nil || !strings.Contains(err.Error(), "404") || !has(got, "ns:batch") {
		t.Errorf("a namespace that is not found: %v, %v", got, err)
	}
	api.set(fails(403, "forbidden"))
	if err := a.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "allow get on the resource namespaces") {
		t.Errorf("check: %v", err)
	}
}

// An API server that hangs or fails delays the callers in a known namespace by two seconds at
// most, and costs them no selectors for HeldFor.
func TestAPIServerOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority(t)
		api := newKubelet(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"metadata": {"name": "prod", "labels": {"team": "payments"}}}`)
		})
		l := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
		srv := &http.Server{
			Handler: api, ErrorLog: log.New(io.Discard, "", 0),
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{ca.server("api.example.org")}},
		}
		var served sync.WaitGroup
		served.Go(func() { _ = srv.ServeTLS(l, "", "") })
		t.Cleanup(func() { srv.Close(); served.Wait() })
		a := overPipes(t, newKubelet(answers(handwritten(t))), kubernetes.Config{
			NamespaceLabels: true, APIServer: "api.example.org:443", APIServerCAFile: ca.file,
		})
		a.DialAPIServer(l.dial)
		check := func(when, digit string, took time.Duration, labels bool, failure string) {
			t.Helper()
			start := time.Now()
			got, err := a.Selectors(t.Context(), inPod(webUID, digit))
			if time.Since(start) != took || !has(got, "ns:prod") || has(got, "ns-label:team:payments") != labels {
				t.Errorf("%s: after %s got %v", when, time.Since(start), got)
			}
			if err == nil != (failure == "") || err != nil && !strings.Contains(err.Error(), failure) {
				t.Errorf("%s: error %v, want %q", when, err, failure)
			}
		}
		check("at first", "c", 0, true, "")
		api.set(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		check("within MaxAge", "c", 0, true, "")
		time.Sleep(kubernetes.MaxAge)
		check("hanging", "c", 2*time.Second, true, "labels of namespace prod are 8s old: no answer of the API server within 2s")
		api.set(fails(500, "down"))
		time.Sleep(kubernetes.HeldFor - 20*time.Second)
		check("failing", "c", 0, true, "down")
		time.Sleep(20 * time.Second)
		check("after HeldFor", "c", 0, false, "down")
	})
}

func TestNewRefusesConfig(t *testing.T) {
	t.Parallel()
	for want, cfg := range map[string]kubernetes.Config{
		"a client certificate and its private key": {CertificateFile: "a"},
		"no API server": {NamespaceLabels: true},
	} {
		if _, err := kubernetes.New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", cfg, err, want)
		}
	}
}

// Whatever the kubelet answers, reading it ends, and a container is only found in a pod
// that has it.
func FuzzPodList(f *testing.F) {
	f.Add(listOf(f, map[string]string{webUID: "c"}))
	f.Add([]byte(`{"items": [{"metadata": {"uid": "a", "annotations": {"kubernetes.io/config.mirror": "` + webUID + `"}, "ownerReferences": [{"kind": "Job"}]},
		"status": {"initContainerStatuses": [{"containerID": "containerd://` + id("c") + `", "image": "x"}]}}]}`))
	f.Add([]byte(`{"items": null}`))
	f.Add([]byte(`{"kind": "PodList", "items": [{"metadata": {"uid": "a"}, "status": {"containerStatuses": [null, {"containerID": "x://y"}]}}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		c := inPod(webUID, "c")
		got, err := kubernetes.Read(body, c)
		switch {
		case err != nil && got != nil:
			t.Errorf("an error with selectors: %v", got)
		case got != nil && !has(got, "pod-uid:"+webUID) && !strings.Contains(string(body), "config.mirror"):
			t.Errorf("another pod: %v", got)
		}
		again, err2 := kubernetes.Read(body, c)
		if !reflect.DeepEqual(values(t, got), values(t, again)) || (err == nil) != (err2 == nil) {
			t.Errorf("got %v, then %v", got, again)
		}
	})
}
