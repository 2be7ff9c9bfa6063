// Archives that the strict zip reader takes, around contents that a fuzzer made: a changed pickle
// in a changed archive would end at its CRC.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace isoshard::fuzz {

// Pairs of full name ("archive/data/0") and data, written as torch writes them. No name may be
// longer than 65,535 bytes.
std::string zip_archive(const std::vector<std::pair<std::string, std::string>>& records);

// A file of torch.save with this data.pkl. Storages that the pickle names have the size it says and
// hold zeros; those of more than 64 KiB, or beyond 1 MiB in all, are left out.
std::string torch_archive(const std::string& prefix, const std::string& data_pkl);

}  // namespace isoshard::fuzz
