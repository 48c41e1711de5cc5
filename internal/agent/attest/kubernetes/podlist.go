package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/attest/cgroup"
)

// pod has the fields of a Kubernetes Pod (core/v1) that selectors need. The rest, some
// nine tenths, is not kept.
type pod struct {
	Metadata struct {
		Name            string
		Namespace       string
		UID             string
		Labels          map[string]string
		OwnerReferences []struct{ Kind, Name, UID string }
		Annotations     struct {
			// Mirror is set in the API server's copy of a static pod, whose UID differs
			// from the one that the kubelet uses.
			Mirror string `json:"kubernetes.io/config.mirror"`
		}
	}
	Spec struct {
		ServiceAccountName string
		NodeName           string
	}
	Status struct {
		ContainerStatuses          []*container
		InitContainerStatuses      []*container // with native sidecars
		EphemeralContainerStatuses []*container
	}
}

// container has the fields of a ContainerStatus.
type container struct {
	Name        string
	Image       string
	ImageID     string
	ContainerID string // RUNTIME://ID; empty before the container is created
}

// podList is a kubelet's list of its node's pods. It is immutable.
type podList struct {
	pods       map[string]*pod // by UID
	containers map[string][]found
}

// found is a container and its pod.
type found struct {
	pod       *pod
	container *container // nil: the pod alone is known
}

// readPodList reads a PodList (core/v1) of any length, one pod at a time.
func readPodList(r io.Reader) (*podList, error) {
	l := &podList{pods: make(map[string]*pod), containers: make(map[string][]found)}
	dec := json.NewDecoder(r)
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.Join(errors.New("it is not a JSON object"), err)
	}
	listed := false
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil, err
		}
		if name != "items" {
			var skipped json.RawMessage
			if err := dec.Decode(&skipped); err != nil {
				return nil, err
			}
			continue
		}
		listed = true
		if err := l.readItems(dec); err != nil {
			return nil, err
		}
	}
	if _, err := dec.Token(); err != nil { // the object's end
		return nil, err
	}
	if !listed {
		return nil, errors.New("it has no items")
	}
	return l, nil
}

func (l *podList) readItems(dec *json.Decoder) error {
	switch t, err := dec.Token(); {
	case err != nil:
		return err
	case t == nil: // an empty list in Go
		return nil
	case t != json.Delim('['):
		return errors.New("its items are not a list")
	}
	for dec.More() {
		p := new(pod)
		if err := dec.Decode(p); err != nil {
			return fmt.Errorf("pod %d: %w", len(l.pods), err)
		}
		l.add(p)
	}
	_, err := dec.Token() // the list's end
	return err
}

func (l *podList) add(p *pod) {
	if p.Metadata.UID == "" {
		return
	}
	l.pods[p.Metadata.UID] = p
	for _, statuses := range [][]*container{p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, c := range statuses {
			if c == nil {
				continue
			}
			if _, id, ok := strings.Cut(c.ContainerID, "://"); ok && id != "" {
				l.containers[id] = append(l.containers[id], found{p, c})
			}
		}
	}
}

// find returns the container; its pod alone if podOnly is set and the container is not
// reported; and nothing if it is not there. It is an error if the list contradicts the
// control group or itself.
func (l *podList) find(c cgroup.Container, podOnly bool) (found, error) {
	all := l.containers[c.ID]
	matching := all
	if c.PodUID != "" {
		matching = filter(all, func(p *pod) bool { return p.Metadata.UID == c.PodUID })
		if len(matching) == 0 {
			matching = filter(all, func(p *pod) bool { return p.Metadata.Annotations.Mirror == c.PodUID })
		}
	}
	switch {
	case len(matching) == 1:
		return matching[0], nil
	case len(matching) > 1:
		return found{}, fmt.Errorf("the kubelet reports container %s in %d pods", c.ID, len(matching))
	case len(all) > 0:
		return found{}, fmt.Errorf("container %s is in pod %s, and the kubelet reports it in pod %s", c.ID, c.PodUID, all[0].pod.Metadata.UID)
	case podOnly && l.pods[c.PodUID] != nil:
		return found{pod: l.pods[c.PodUID]}, nil
	}
	return found{}, nil
}

func filter(all []found, keep func(*pod) bool) (kept []found) {
	for _, f := range all {
		if keep(f.pod) {
			kept = append(kept, f)
		}
	}
	return kept
}

func (p *pod) isEphemeral(c *container) bool {
	return c != nil && slices.Contains(p.Status.EphemeralContainerStatuses, c)
}

// selectors returns the selectors of the pod.
func (p *pod) selectors() []cache.Selector {
	s := selectors(make([]cache.Selector, 0, 12+2*len(p.Status.ContainerStatuses)+2*len(p.Status.InitContainerStatuses)+len(p.Metadata.Labels)))
	s.add("ns:", p.Metadata.Namespace)
	s.add("sa:", p.Spec.ServiceAccountName)
	s.add("node-name:", p.Spec.NodeName)
	s.add("pod-uid:", p.Metadata.UID)
	s.add("pod-name:", p.Metadata.Name)
	s.add("pod-image-count:", strconv.Itoa(len(p.Status.ContainerStatuses)))
	s.add("pod-init-image-count:", strconv.Itoa(len(p.Status.InitContainerStatuses)))
	s.addImages("pod-image:", p.Status.ContainerStatuses...)
	s.addImages("pod-init-image:", p.Status.InitContainerStatuses...)
	for _, o := range p.Metadata.OwnerReferences {
		s.add("pod-owner:", o.Kind+":"+o.Name)
		s.add("pod-owner-uid:", o.Kind+":"+o.UID)
	}
	return appendLabels(s, "pod-label:", p.Metadata.Labels)
}

// selectors appends the selectors of the container to those of its pod.
func (c *container) selectors(ofPod []cache.Selector) []cache.Selector {
	s := selectors(ofPod)
	s.add("container-name:", c.Name)
	s.addImages("container-image:", c)
	return s
}

type selectors []cache.Selector

func (s *selectors) add(name, value string) {
	*s = append(*s, cache.Selector{Type: Name, Value: name + value})
}

// addImages adds the two names of each image, without repetition. As in SPIRE, they are
// empty while the kubelet does not report them.
func (s *selectors) addImages(name string, containers ...*container) {
	first := len(*s)
	for _, c := range containers {
		if c == nil {
			c = new(container)
		}
		for _, image := range []string{c.Image, c.ImageID} {
			if selector := (cache.Selector{Type: Name, Value: name + image}); !slices.Contains((*s)[first:], selector) {
				*s = append(*s, selector)
			}
		}
	}
}

func appendLabels(s selectors, name string, labels map[string]string) selectors {
	for key, value := range labels {
		s.add(name, key+":"+value)
	}
	return s
}
