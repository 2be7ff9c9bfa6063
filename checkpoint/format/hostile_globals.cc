// See hostile_globals.h. Families as unpickling attacks on model files have used them: processes,
// interpreters, installers, loaders that load again, the network, files, threads.
#include "checkpoint/format/hostile_globals.h"

#include <algorithm>
#include <string_view>
#include <unordered_set>

namespace isoshard::checkpoint {
namespace {

using Names = std::unordered_set<std::string_view>;

// With everything below them.
const Names kModules = {
    // processes and what starts them
    "os", "posix", "nt", "subprocess", "_posixsubprocess", "_winapi", "pty", "commands", "popen2",
    "multiprocessing", "asyncio", "concurrent", "platform", "uuid", "imaplib", "pydoc",
    "_osx_support", "_aix_support", "sh", "pexpect", "test", "webbrowser", "antigravity", "sched",
    // interpreters, compilers and what calls them
    "runpy", "code", "codeop", "timeit", "bdb", "pdb", "cProfile", "profile", "trace", "doctest",
    "idlelib", "lib2to3", "distutils", "setuptools", "cffi", "ctypes", "_ctypes", "types",
    "inspect", "operator", "functools", "importlib", "imp", "pkgutil", "zipimport", "zipapp",
    "pkg_resources", "site", "sys", "gc", "marshal", "compileall", "py_compile", "numba",
    // installers
    "pip", "ensurepip", "venv",
    // loaders that load again
    "pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "joblib", "shelve",
    "copyreg", "copy_reg", "pandas.io.pickle",
    // the network
    "socket", "_socket", "ssl", "_ssl", "http", "httplib", "urllib", "urllib2", "ftplib", "smtplib",
    "telnetlib", "poplib", "nntplib", "xmlrpc", "socketserver", "requests", "aiohttp", "httpx",
    "paramiko",
    // files and the system
    "io", "_io", "codecs", "pathlib", "tempfile", "shutil", "glob", "fileinput", "linecache",
    "sqlite3", "_sqlite3", "winreg", "_winreg", "signal", "_signal", "threading", "_thread",
    "atexit", "logging.config", "mmap", "fcntl", "resource",
    // torch and numpy
    "torch.hub", "torch.serialization", "torch.jit", "torch.package", "torch.ops", "torch._ops",
    "torch.classes", "torch._classes", "torch.utils", "torch._inductor", "torch._dynamo",
    "torch.fx", "torch.distributed.rpc", "torch.multiprocessing", "torch._export", "torch.export",
    "torch.compiler", "torch._library", "torch.library", "torch.testing", "numpy.f2py",
    "numpy.testing", "numpy.distutils", "numpy.lib", "numpy.ctypeslib"};

// Of modules that hold other things too.
const Names kFunctions = {"torch load",   "torch save",    "torch compile",    "numpy load",
                          "numpy save",   "numpy savez",   "numpy fromfile",   "numpy memmap",
                          "numpy tofile", "numpy loadtxt", "numpy genfromtxt", "numpy fromregex"};

// Classes of builtins that hold values; functions run things.
const Names kValues = {"set",       "frozenset", "list",   "dict",   "tuple",   "int",   "long",
                       "float",     "complex",   "bool",   "str",    "bytes",   "slice", "unicode",
                       "bytearray", "range",     "xrange", "object", "Ellipsis"};

bool is_exception(std::string_view attribute) {
  return attribute.ends_with("Error") || attribute.ends_with("Exception") ||
         attribute.ends_with("Warning");
}

// Whether the list has the module or one it lies in.
bool is_listed(std::string_view module) {
  for (size_t end = module.find('.'); end != std::string_view::npos;
       end = module.find('.', end + 1)) {
    if (kModules.contains(module.substr(0, end))) return true;
  }
  return kModules.contains(module);
}

bool is_hostile(const std::string& module, const std::string& attribute) {
  if (is_listed(module) || kFunctions.contains(module + " " + attribute)) return true;
  const bool builtin = module == "builtins" || module == "__builtin__";
  return builtin && !kValues.contains(attribute) && !is_exception(attribute);
}

}  // namespace

std::string find_hostile_global(const Pickle& pickle) {
  for (NodeId node = 0; node < pickle.size(); ++node) {
    if (pickle.kind(node) != Kind::kGlobal) continue;
    if (is_hostile(pickle.module(node), pickle.attribute(node))) {
      return pickle.module(node) + " " + pickle.attribute(node);
    }
  }
  return "";
}

}  // namespace isoshard::checkpoint
